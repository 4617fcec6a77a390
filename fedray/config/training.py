"""The sections `lora`, `reft`, `train` and `evaluation`: what every client trains, how, and how it is measured."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from fedray.config.metric import Metric, MetricOption
from fedray.config.section import Fraction, PositiveInt, Section


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
    schedule: Literal["constant", "linear"] = "constant"
    """Learning rate within a round: constant, or linear decay to 0."""
    round_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The learning rate of round t is lr · round_decay^t."""


class EvaluationConfig(Section):
    every: Annotated[int, Field(ge=0)] = 1
    """Measure test accuracy before and after local training in every n-th round; 0: only at the end."""
    metrics: tuple[MetricOption, ...] = ()
    """Names of metrics, or `class: module.Class` of your own with their fields. The first one is what tables show first
    and models are selected by. `metric: NAME` is short for a list of one. Default: accuracy (classification), pearson
    (regression), token_accuracy (causal_lm)."""
    batch_size: PositiveInt = 32
    """Examples per batch."""
    common: tuple[Literal["server", "aggregated", "personalised"], ...] = ("server", "aggregated", "personalised")
    """Whose models are evaluated on the common test set, if the data has one: the server's own, where a method has one
    model for all clients, and every client's before and after local training. Where the server has a model,
    `aggregated` is the same one, and only the server's is evaluated."""
    max_new_tokens: PositiveInt = 32
    """exact_match, rouge_l: longest generated answer."""

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
