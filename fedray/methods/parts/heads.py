"""The task head. Whether it is local or shared changes accuracy strongly, so all methods offer the same choices.

shared: averaged by the server, with the weights that the method gives its clients (FedHFT: per cluster); local: trained
and kept by the client; frozen_label_text, frozen_random: the embeddings of the label names, or the experiment's random
draw, equal for all clients, neither trained nor sent. The draw is the control that shows what the label names
contribute.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from torch import nn

from fedray.adapters.adapter import Adapter
from fedray.adapters.kind import AdapterKind
from fedray.aggregation.means import weighted_mean
from fedray.config import Head
from fedray.errors import ConfigError
from fedray.types import Vector

Payload = TypeVar("Payload")

FROZEN: tuple[Head, ...] = ("frozen_label_text", "frozen_random")
"""Heads that stay as the worker draws them."""


def trainable(head: Head, adapter: Adapter, *groups: str) -> tuple[str, ...]:
    """Return `groups`, and the head if the model has one that trains."""
    return (*groups, "head") if "head" in adapter.names and head not in FROZEN else groups


def load(head: Head, adapter: Adapter, shared: Vector | None, own: Vector | None) -> None:
    """Load the head that the client starts the round with; a frozen head stays as it is."""
    vector = {"shared": shared, "local": own}.get(head)
    if vector is not None:
        adapter.load("head", vector)


def read(head: Head, adapter: Adapter) -> tuple[Vector | None, Vector | None]:
    """Return (the head that is sent, the head that stays with the client)."""
    if "head" not in adapter.names or head in FROZEN:
        return None, None
    vector = adapter.read("head")
    return (vector, None) if head == "shared" else (None, vector)


def initial(head: Head, vector: Vector | None) -> tuple[Vector | None, Vector | None]:
    """Return (the server's first head, every client's first head)."""
    return (vector if head == "shared" else None, vector if head == "local" else None)


def average(previous: Vector | None, heads: Sequence[Vector | None], weights: Sequence[float]) -> Vector | None:
    """Return the weighted mean of the heads that were sent, or the previous one if there are none."""
    came = [(vector, weight) for vector, weight in zip(heads, weights, strict=True) if vector is not None]
    if not came:
        return previous
    return weighted_mean(np.stack([vector for vector, _ in came]), np.array([weight for _, weight in came]))


def require_head(method: str, adapter: Adapter) -> None:
    """Refuse a model without a task head.

    Raises:
        ConfigError: it has none.
    """
    if "head" not in adapter.names:
        raise ConfigError(f"method {method}: needs a task head; task `causal_lm` has none. Use `local` instead")


def attach(model: nn.Module, kind: AdapterKind, head: Head) -> Adapter:
    """Attach the adapter of a method that has none of its own: its kind's group trains, and so does the head unless it
    is frozen."""
    adapter = kind.attach(model)
    adapter.set_trainable(*trainable(head, adapter, kind.group))
    return adapter
