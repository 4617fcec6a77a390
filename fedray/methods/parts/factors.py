"""LoRA vectors as low-rank matrices, one per target: split and join, masked rows, bitsets.

A LoRA layout holds, target after target, A [r, d_in] and B [d_out, r].
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedray.adapters.layout import Layout
from fedray.aggregation.low_rank import LowRank
from fedray.aggregation.masks import Mask, pack, unpack
from fedray.aggregation.products import pad
from fedray.methods.parts.capacity import own_layout
from fedray.types import Capacity, Vector

Delta = tuple[LowRank, ...]
"""One low-rank matrix B A per target, in layout order."""


def split(layout: Layout, vector: Vector) -> Delta:
    """Return the vector's factors, as views. [d] -> one (B, A) per target

    Raises:
        ValueError: the layout does not alternate A and B.
    """
    parts = [slot.part for slot in layout.slots]
    if parts != ["A", "B"] * (len(parts) // 2):
        raise ValueError(f"expected slots A, B for each target, got {parts}")
    tensors = [view for _, view in layout.items(vector)]
    return tuple(LowRank(B=b, A=a) for a, b in zip(tensors[::2], tensors[1::2], strict=True))


def join(deltas: Sequence[LowRank]) -> Vector:
    """Return the flat vector of factors, the inverse of `split`."""
    parts = [part.reshape(-1) for delta in deltas for part in (delta.A, delta.B)]
    return np.concatenate(parts).astype(np.float32, copy=False)


def by_target(layout: Layout, sent: Sequence[tuple[Capacity, Vector]]) -> list[Delta]:
    """Return, for each target, the clients' factors, each of the rank that the client's tier has.

    Args:
        layout: of the common adapter.
        sent: each client's capacity and its factors.
    """
    clients = [split(own_layout(layout, capacity), vector) for capacity, vector in sent]
    return list(zip(*clients, strict=True))


def by_target_padded(layout: Layout, sent: Sequence[tuple[Capacity, Vector]]) -> list[Delta]:
    """Return the same with zeros for the components that a tier lacks, so that all have the common rank."""
    ranks = [slot.shape[0] for slot in layout.slots[::2]]
    return [tuple(pad(x, rank) for x in target) for rank, target in zip(ranks, by_target(layout, sent), strict=True)]


def zero(layout: Layout) -> Delta:
    """Return zero matrices of rank 0 with the layout's outer shapes."""
    pairs = zip(layout.slots[::2], layout.slots[1::2], strict=True)
    return tuple(LowRank.zeros(b.shape[0], a.shape[1]) for a, b in pairs)


def first_components(delta: Delta, rank: int) -> Delta:
    """Return the factors with zeros for all but the first `rank` components; the shapes stay."""
    return tuple(pad(LowRank(B=x.B[:, :rank], A=x.A[:rank]), x.rank) for x in delta)


def keep_rows(delta: Delta, masks: Sequence[Mask]) -> Delta:
    """Return B without the rows outside the masks: what a masked client sends. B [d_out, r] -> [m, r]"""
    return tuple(LowRank(B=d.B[mask], A=d.A) for d, mask in zip(delta, masks, strict=True))


def receive(layout: Layout, factors: Vector, masks: Sequence[Mask]) -> Delta:
    """Return the matrices that `join(keep_rows(...))` came from, with zero rows where nothing was sent."""
    deltas, start = [], 0
    for slot_a, slot_b, mask in zip(layout.slots[::2], layout.slots[1::2], masks, strict=True):
        rank, kept = slot_a.shape[0], int(mask.sum())
        a = factors[start : start + slot_a.size].reshape(slot_a.shape)
        start += slot_a.size
        b = np.zeros(slot_b.shape, np.float32)
        b[mask] = factors[start : start + kept * rank].reshape(kept, rank)
        start += kept * rank
        deltas.append(LowRank(B=b, A=a))
    if start != factors.size:
        raise ValueError(f"the masks ask for {start} values, {factors.size} came")
    return tuple(deltas)


def pack_masks(masks: Sequence[Mask]) -> npt.NDArray[np.uint8] | None:
    """Return the masks as one bitset, or None where every row is kept."""
    return None if all(mask.all() for mask in masks) else np.concatenate([pack(mask) for mask in masks])


def unpack_masks(layout: Layout, bits: npt.NDArray[np.uint8] | None) -> tuple[Mask, ...]:
    """Return one mask per target, which is one per slot of part B."""
    sizes = [slot.shape[0] for slot in layout.slots if slot.part == "B"]
    if bits is None:
        return tuple(np.ones(size, bool) for size in sizes)
    ends = np.cumsum([(size + 7) // 8 for size in sizes])
    return tuple(unpack(part, size) for part, size in zip(np.split(bits, ends[:-1]), sizes, strict=True))
