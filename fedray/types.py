"""The types that every package shares."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import Any, Final, Literal, TypeVar

import numpy as np
import numpy.typing as npt

ClientId = str
"""Name of a client: any text that is not empty. `fedray.storage.paths.safe_name` returns the name of its files."""

Vector = npt.NDArray[np.float32]
"""A flat float32 vector; a `Layout` says what it holds."""

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

COMMON: Final = "common"
"""Test examples that belong to no client: every client's model, and the server's, is evaluated on all of them."""
Role = Literal[Split, "common"]
ROLES: tuple[Role, ...] = (*SPLITS, COMMON)
"""What the rows of a source serve as: a split, which is assigned to the clients, or the common test set."""

Task = Literal["classification", "regression", "causal_lm"]

Moment = Literal["aggregated", "personalised"]
"""When a client's model is evaluated: right after it has loaded what the server aggregated, or after its local training
that follows."""

IGNORED = -100
"""Label of a token that does not contribute to the loss, as in torch and transformers."""

Capacity = Mapping[str, Any]
"""What the devices of a tier can hold, by name of the tier's field in the configuration. Methods and adapter kinds read
the values, and the framework only passes them on; a missing name means no limit.

- `mask_ratio`: ρ_k in (0, 1), share of the adapter's output rows.
- `lora_rank`: r_k, LoRA rank.
- `reft_layers`: blocks whose output is edited.
"""


@dataclass(frozen=True)
class Client:
    """A virtual client as methods see it: a value, never an actor's attribute.

    Attributes:
        index: position in the sorted list of all clients, 0 to K-1.
        num_examples: training examples of the client (n_k).
        tier: name of the client's capacity tier.
        capacity: what the tier's devices can hold.
    """

    id: ClientId
    index: int
    num_examples: int
    tier: str = "default"
    capacity: Capacity = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Evaluation:
    """A model on some examples.

    Attributes:
        loss: mean over the examples, or over their answer tokens for causal_lm.
        metrics: the configured metrics by label, in their order.
        groups: the same for the examples of each task, or of each named test set, where there are several.
        examples: where they were asked for, values of every example by name, in the table's order: `loss`, each metric
            that one example has, and what was predicted (`prediction`) or generated (`text`).
    """

    loss: float
    metrics: Mapping[str, float]
    num_examples: int
    groups: Mapping[str, "Evaluation"] = field(default_factory=dict)
    examples: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    @property
    def metric(self) -> float:
        """The first metric, by which models are compared and selected."""
        return next(iter(self.metrics.values()), float("nan"))


def round_number(server_round: int) -> int:
    """Return a round's number as messages and progress show it: rounds count from 0 in code and tables, and from 1 in
    what people read."""
    return server_round + 1


StateClass = TypeVar("StateClass", bound=type[Any])

STATE_TAG = "__state_tag__"
"""Attribute of a registered class that holds the tag under which states are written."""

STATE_TYPES: dict[str, type[Any]] = {}
"""Dataclasses that saved states may hold, by tag; see `state_type`."""


def state_type(tag: str, *former_tags: str) -> Callable[[StateClass], StateClass]:
    """Register a dataclass as part of the states that a method saves. Files contain the tag, not the name of the class
    or its module, so classes may be renamed and moved.

    Args:
        tag: unique name, for example `fedavg.Server`; it must not change once states have been saved.
        former_tags: tags under which older files hold this class.

    Raises:
        TypeError: the class is not a dataclass.
        ValueError: another class already has the tag.
    """

    def register(cls: StateClass) -> StateClass:
        if not is_dataclass(cls):
            raise TypeError(f"state_type({tag!r}): {cls.__qualname__} is not a dataclass")
        for name in (tag, *former_tags):
            other = STATE_TYPES.setdefault(name, cls)
            modules = {other.__module__, cls.__module__}  # a script that names itself in `class:` is imported twice
            if other.__qualname__ != cls.__qualname__ or (len(modules) == 2 and "__main__" not in modules):
                raise ValueError(f"state_type({name!r}): {other.__module__}.{other.__qualname__} already has this tag")
            STATE_TYPES[name] = cls  # the module may have been imported again
        setattr(cls, STATE_TAG, tag)
        return cls

    return register
