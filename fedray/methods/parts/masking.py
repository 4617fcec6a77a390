"""Clients that send only the most important rows of B: FedHFT's masks (arXiv 2510.14054), also under other methods.

Client k trains all it holds and keeps, of each target's B, the ⌈ρ_k d_out⌉ rows of largest importance, where ρ_k is its
tier's `mask_ratio`. Only these travel, with a bitset that says which they are, and a row counts only for the clients
that sent it.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from fedray.adapters.adapter import Adapter
from fedray.adapters.layout import Layout
from fedray.aggregation.masks import Mask, energy, top_rows
from fedray.methods.parts.capacity import Places, places
from fedray.methods.parts.factors import Delta, pack_masks, split, unpack_masks
from fedray.methods.protocol import Local
from fedray.types import Client, Vector

Importance = Literal["fisher", "energy"]
"""Importance of a row: the mean squared gradient of its output over the local examples, or ‖(B A)_{i,:}‖²."""

Bits = npt.NDArray[np.uint8]
"""The masks of all targets as one bitset."""


def mask_ratio(client: Client) -> float:
    """Return ρ_k, the share of output rows that the client can hold."""
    return float(client.capacity.get("mask_ratio", 1.0))


def important_rows(targets: Iterable[str], trained: Delta, importance: Importance, local: Local) -> tuple[Mask, ...]:
    """Return the most important rows of what was trained, per target. A client that keeps all rows needs no importance.

    Args:
        targets: their paths.
        trained: their factors.
        importance: see `Importance`.
        local: the client's side of the round; the trained adapter must be loaded.
    """
    ratio = mask_ratio(local.client)
    if ratio == 1:
        return tuple(np.ones(delta.shape[0], bool) for delta in trained)
    if importance == "energy":
        return tuple(top_rows(energy(delta.B, delta.A), ratio) for delta in trained)
    fisher = local.importance()
    return tuple(top_rows(fisher[target], ratio) for target in targets)


def keep_important(
    adapter: Adapter, layout: Layout, vector: Vector, importance: Importance, local: Local
) -> tuple[Vector, Bits | None]:
    """Return what a masked client sends of a vector, and which rows those are; None: all.

    Args:
        adapter: as it was trained.
        layout: of the vector, with A and B, or with B alone.
        vector: trained values [layout.size].
    """
    trained = split(adapter.layout("lora"), adapter.read("lora"))
    masks = important_rows(tuple(adapter.targets), trained, importance, local)
    local.record("mask_size", int(sum(mask.sum() for mask in masks)))
    bits = pack_masks(masks)
    return (vector, None) if bits is None else (vector[masked_places(layout, layout, bits)], bits)


def masked_places(common: Layout, own: Layout, bits: Bits | None) -> Places | None:
    """Return where the values that a client sent lie in a common vector; None: everywhere, in order.

    Args:
        common: layout of the common vector.
        own: layout of what the client holds of it.
        bits: which rows of B it sent; None: all.
    """
    where = places(common, own)
    if bits is None:
        return where
    everywhere = np.arange(common.size) if where is None else where
    masks = iter(unpack_masks(own, bits))
    starts: Sequence[Places] = np.split(everywhere, own.offsets[1:])
    kept = [
        spots.reshape(slot.shape)[next(masks)].reshape(-1) if slot.part == "B" else spots
        for slot, spots in zip(own.slots, starts, strict=True)
    ]
    return np.concatenate(kept)
