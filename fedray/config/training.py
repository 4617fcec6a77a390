"""The sections `lora`, `reft`, `train` and `evaluation`: what every client trains, how, and how it is measured."""

from typing import Annotated, Literal

from pydantic import Field

from fedray.config.generation import GenerationSection
from fedray.config.metric import MetricOption
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
    metric: MetricOption | None = None
    """Name of a metric, or `class: module.Class` of your own with its fields. Default: accuracy (classification),
    pearson (regression), token_accuracy (causal_lm)."""
    batch_size: PositiveInt = 32
    """Examples per batch."""
    max_new_tokens: PositiveInt = 32
    """exact_match, rouge_l: longest generated answer."""
    generation: GenerationSection = GenerationSection()
