"""The sections `lora`, `reft`, `train` and `evaluation`: what every client trains, how, and how it is measured."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from fedray.config.generation import GenerationSection
from fedray.config.metric import Metric, MetricOption
from fedray.config.section import Fraction, PositiveInt, Section

Shape = Literal["constant", "linear", "cosine"]
"""How a learning rate changes after its warm-up."""


def _number_or_share(value: float) -> float:
    if value >= 1 and value != int(value):
        raise ValueError(f"expected a whole number, or a share below 1, got {value}")
    return value


Warmup = Annotated[float, Field(ge=0), AfterValidator(_number_or_share)]


class LoraSection(Section):
    rank: PositiveInt = 8
    """r."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """lora_alpha; the branch is scaled by s = alpha / rank."""
    dropout: Fraction = 0.0
    """Dropout on the LoRA input."""
    targets: tuple[str, ...] = ()
    """Names of the target linear layers (last part of the module path, e.g. q_proj). Default: query and value."""


class ReftSection(Section):
    kind: Literal["loreft", "noreft", "direft", "nodireft"] = "loreft"
    """Intervention (Wu et al., arXiv 2404.03592): direft keeps R orthonormal as pyreft does, nodireft leaves it free as
    the paper does."""
    rank: PositiveInt = 4
    """r."""
    layers: Literal["all"] | tuple[int, ...] = "all"
    """Indices of the blocks whose output is edited."""
    positions: Annotated[str, Field(pattern=r"^(all|f\d+(\+l\d+)?|l\d+)$")] = "f1+l1"
    """`all`, or `f<p>+l<s>`: the first p and the last s non-padding tokens."""
    tie_positions: bool = False
    """Whether prefix and suffix share one intervention."""
    short_prompts: Literal["prefix", "halves"] = "prefix"
    """What is edited in a prompt of n tokens that is too short for `f<p>+l<s>`. prefix: the first min(p, n), and what
    is left of the last s. halves: at most n/2, rounded down, at either end, also where only one end is edited; this is
    what pyreft does."""
    rotation: Literal["absolute", "relative"] = "absolute"
    """In which coordinates R trains. absolute: R is a product of reflections. relative: a product of reflections times
    the R that was loaded, as in pyreft; with the same learning rate R then moves about twice as far. No difference for
    kinds without R."""
    dropout: Fraction = 0.0
    """Dropout on the intervened representation."""


class TrainConfig(Section):
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the client's training examples per round."""
    max_steps: PositiveInt | None = None
    """At most this many optimizer steps per round."""
    batch_size: PositiveInt = 8
    """Examples per micro-batch."""
    accumulation: PositiveInt = 1
    """Micro-batches per optimizer step."""
    group_by_length: bool = False
    """Whether the examples of a step are of similar length, so that less padding is computed: an epoch's shuffled
    examples are sorted within runs of a few steps, and the steps are shuffled again. Faster; other batches than
    without."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Its state starts afresh each round."""
    lr: Annotated[float, Field(gt=0)] = 5e-4
    """Peak learning rate."""
    head_lr: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of the task head; default `lr`."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW's running averages."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's denominator."""
    momentum: Fraction = 0.0
    """SGD only."""
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest gradient norm; null: no clipping."""
    schedule: Shape = "constant"
    """The learning rate over the steps after the warm-up: constant, or a linear or half a cosine's fall to `min_lr`."""
    schedule_over: Literal["round", "run"] = "round"
    """round: `schedule` and `warmup_steps` start afresh in every round. run: they go through the steps of all rounds,
    counted as if the client took part in each."""
    warmup_steps: Warmup = 0.0
    """Steps in which the learning rate rises from 0; below 1: their share of the steps, rounded up."""
    round_schedule: Shape = "constant"
    """Multiplies the learning rate by what falls over the rounds after the warm-up, and is constant within a round."""
    warmup_rounds: Warmup = 0.0
    """Rounds, below 1 their share, with a smaller learning rate: of two rounds the first has 1/3, the second 2/3."""
    round_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The learning rate of round t is multiplied by round_decay^t."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Where `schedule`, `round_schedule` and `round_decay` fall to; `head_lr` falls to the same share of itself."""

    @model_validator(mode="after")
    def _schedules(self) -> Self:
        falls = self.schedule != "constant" or self.round_schedule != "constant" or self.round_decay < 1
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr: {self.min_lr} is above lr: {self.lr}")
        if self.min_lr > 0 and not falls:
            raise ValueError(
                f"min_lr: {self.min_lr}, but the learning rate does not fall; choose a schedule, a round_schedule or a "
                "round_decay, or leave min_lr out"
            )
        if self.schedule_over == "run":
            for name in ("round_schedule", "warmup_rounds", "round_decay"):
                if (value := getattr(self, name)) != type(self).model_fields[name].default:
                    raise ValueError(
                        f"{name}: {value}, but schedule_over: run is one schedule for all rounds; leave {name} out"
                    )
        elif self.max_steps is not None and warmup_length(self.warmup_steps, self.max_steps) >= self.max_steps:
            raise ValueError(
                f"warmup_steps: {self.warmup_steps:g} are all of a round's at most max_steps: {self.max_steps} steps; "
                "fewer, or schedule_over: run"
            )
        return self

    @property
    def depends_on_rounds(self) -> bool:
        """Whether the learning rate of a round depends on how many rounds there are."""
        return self.schedule_over == "run" or self.round_schedule != "constant" or 0 < self.warmup_rounds < 1

    def check_rounds(self, rounds: int) -> None:
        """Check what lasts over rounds against their number.

        Raises:
            ValueError: a warm-up lasts as long as the run.
        """
        if warmup_length(self.warmup_rounds, rounds) >= rounds:
            raise ValueError(f"warmup_rounds: {self.warmup_rounds:g} are all of rounds: {rounds}; expected fewer")
        if self.schedule_over == "run" and self.max_steps is not None:
            steps = rounds * self.max_steps
            if warmup_length(self.warmup_steps, steps) >= steps:
                raise ValueError(
                    f"warmup_steps: {self.warmup_steps:g} are all of the run's at most {steps} steps; expected fewer"
                )


def warmup_length(warmup: float, total: int) -> int:
    """Return how many of `total` steps or rounds a warm-up has: a number, or below 1 a share that is rounded up as
    transformers does."""
    return math.ceil(warmup * total) if warmup < 1 else int(warmup)


class EvaluationConfig(Section):
    every: Annotated[int, Field(ge=0)] = 1
    """Measure test accuracy before and after local training in every n-th round; 0: only at the end."""
    final: Literal["both", "aggregated"] = "both"
    """What the final pass measures of every client. both: its model before and after it trains once more. aggregated:
    only before, so nothing is trained, and the final pass has no scores of `personalised`."""
    metrics: tuple[MetricOption, ...] = ()
    """Names of metrics, or `class: module.Class` of your own with their fields. The first one is what tables show first
    and models are selected by. `metric: NAME` is short for a list of one. Default: accuracy (classification), pearson
    (regression), token_accuracy (causal_lm)."""
    batch_size: PositiveInt = 32
    """Examples per batch."""
    examples: bool = False
    """Keep what every single example scored in the final pass, in examples.parquet."""
    common: tuple[Literal["server", "aggregated", "personalised"], ...] = ("server", "aggregated", "personalised")
    """Whose models are evaluated on the common test set, if the data has one: the server's own, where a method has one
    model for all clients, and every client's before and after local training. Where the server has a model,
    `aggregated` is the same one, and only the server's is evaluated."""
    max_new_tokens: PositiveInt = 32
    """Metrics of texts: longest generated answer."""
    generation: GenerationSection = GenerationSection()
    """How texts are generated for metrics that read them: greedily, by beam search, by sampling; where they end."""

    @model_validator(mode="before")
    @classmethod
    def _one_metric(cls, value: Any) -> Any:
        """Read `metric: NAME`, and a single one under `metrics`, as a list of one."""
        if not isinstance(value, Mapping):
            return value
        fields = dict(value)
        one, several = fields.pop("metric", None), fields.get("metrics")
        if one is not None and several:
            raise ValueError("metric, metrics: name the metrics in one of the two")
        if one is not None or isinstance(several, str | Mapping):
            fields["metrics"] = [several if one is None else one]
        return fields

    @field_validator("metrics")
    @classmethod
    def _different(cls, value: tuple[Metric, ...]) -> tuple[Metric, ...]:
        labels = [metric.label for metric in value]
        if twice := [label for i, label in enumerate(labels) if label in labels[:i]]:
            raise ValueError(f"metrics: {twice[0]!r} occurs more than once")
        return value
