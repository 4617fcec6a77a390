"""Clients' LoRA factors by hand, without a model: two targets of 9 x 7 and 4 x 8 with rank 3, and a head of 5."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedray.adapters.draws import draw_lora
from fedray.adapters.kinds.lora import LoraKind
from fedray.adapters.layout import Layout, Slot
from fedray.config import LoraSection
from fedray.methods.bases.shared_adapter import GlobalAdapter
from fedray.methods.parts.capacity import own_layout
from fedray.methods.protocol import Initial, Update
from fedray.types import Client

RANK = 3
SHAPES = ((9, 7), (4, 8))
LORA = LoraKind(lora=LoraSection(rank=RANK))
LAYOUT = Layout(
    tuple(
        slot
        for index, (d_out, d_in) in enumerate(SHAPES)
        for slot in (Slot(f"layer.{index}", "A", (RANK, d_in)), Slot(f"layer.{index}", "B", (d_out, RANK)))
    )
)
HEAD = Layout((Slot("classifier.weight", "tensor", (5,)),))
INITIAL = Initial(
    7, {"lora": LAYOUT, "head": HEAD}, {"lora": draw_lora(LAYOUT, 7), "head": np.linspace(0, 1, 5, dtype=np.float32)}
)


Updates = list[Update[GlobalAdapter]]


def cohort(seed: int, examples: Sequence[int], ranks: Sequence[int | None] | None = None) -> Updates:
    """One update per number of examples, of random factors and a random head; the rank is the tier's."""
    rng, updates = np.random.default_rng(seed), []
    for index, (number, rank) in enumerate(zip(examples, ranks or [None] * len(examples), strict=True)):
        client = Client(f"client_{index}", index, number, capacity={} if rank is None else {"lora_rank": rank})
        payload = GlobalAdapter(
            rng.normal(size=own_layout(LAYOUT, client.capacity).size).astype(np.float32),
            rng.normal(size=HEAD.size).astype(np.float32),
        )
        updates.append(Update(client, number, payload))
    return updates


def factors(layout: Layout, vector: Any) -> list[tuple[Any, Any]]:
    """(A, B) of each target in float64, read from the vector by position."""
    tensors, start = [], 0
    for slot in layout.slots:
        tensors.append(np.asarray(vector[start : start + slot.size], np.float64).reshape(slot.shape))
        start += slot.size
    assert start == len(vector)
    return list(zip(tensors[::2], tensors[1::2], strict=True))


def sent(updates: Updates, layout: Layout = LAYOUT) -> list[list[tuple[Any, Any]]]:
    """(A_k, B_k) by target and client."""
    own = [factors(own_layout(layout, update.capacity), update.payload.adapter) for update in updates]
    return [list(target) for target in zip(*own, strict=True)]


def shares(updates: Updates) -> Any:
    """w_k = n_k / Σ n."""
    return np.array([update.num_examples for update in updates]) / sum(update.num_examples for update in updates)


def mean_products(updates: Updates, layout: Layout = LAYOUT) -> list[Any]:
    """Σ_k w_k B_k A_k of each target, dense."""
    w = shares(updates)
    return [sum(w[k] * b @ a for k, (a, b) in enumerate(target)) for target in sent(updates, layout)]


def padded_means(updates: Updates, layout: Layout = LAYOUT) -> list[tuple[Any, Any]]:
    """(Ā, B̄) of each target, with zeros for the components that a client lacks."""
    w, found = shares(updates), []
    for slots, target in zip(
        zip(layout.slots[::2], layout.slots[1::2], strict=True), sent(updates, layout), strict=True
    ):
        mean_a, mean_b = (np.zeros(slot.shape) for slot in slots)
        for share, (a, b) in zip(w, target, strict=True):
            mean_a[: len(a)] += share * a
            mean_b[:, : len(a)] += share * b
        found.append((mean_a, mean_b))
    return found


def mean_head(updates: Updates) -> Any:
    """Σ_k w_k head_k."""
    return shares(updates) @ np.stack([update.payload.head for update in updates]).astype(np.float64)


def products(layout: Layout, vector: Any) -> list[Any]:
    """B A of each target, dense."""
    return [b @ a for a, b in factors(layout, vector)]


def dense(carried: Any) -> list[Any]:
    """Each target's carried sum, dense."""
    return [x.B.astype(np.float64) @ x.A.astype(np.float64) for x in carried]


def uploads(run: Any) -> Updates:
    """What a real run's clients would send up in its next round, in the order of their ids."""
    return [Update(result.client, result.num_examples, result.payload) for result in run.serve().values()]
