"""Clients that hold only a part of the common adapter: the first r_k components of every LoRA (of a core the leading
block), the interventions of some layers. What a client holds has a layout of its own, whose values have positions in
the common vector.

Zero-padding and truncating LoRA factors is HetLoRA's way (arXiv 2401.06432) for the cohort's common adapter; here a
value counts only for the clients that hold it, so that a component that few clients train does not shrink towards zero.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from fedray.adapters.layout import Layout, Slot
from fedray.aggregation.means import weighted_mean
from fedray.types import Capacity, Client, ClientId, Vector

Places = npt.NDArray[np.int64]


@lru_cache(maxsize=256)
def _own(common: Layout, lora_rank: int | None, reft_layers: tuple[int, ...] | None) -> Layout:
    slots: list[Slot] = []
    for slot in common.slots:
        shape = slot.shape
        if slot.part == "A" and lora_rank is not None:
            shape = (min(shape[0], lora_rank), shape[1])
        if slot.part == "B" and lora_rank is not None:
            shape = (shape[0], min(shape[1], lora_rank))
        if slot.part == "core" and lora_rank is not None:
            shape = (min(shape[0], lora_rank), min(shape[1], lora_rank))
        if slot.part not in ("R", "P", "W", "b") or reft_layers is None or block_of(slot) in reft_layers:
            slots.append(replace(slot, shape=shape))
    own = Layout(tuple(slots))
    return common if own == common else own


def own_layout(common: Layout, capacity: Capacity) -> Layout:
    """Return the layout of what a client of this capacity holds of a common one: that itself if it holds everything."""
    return _own(common, capacity.get("lora_rank"), capacity.get("reft_layers"))


@lru_cache(maxsize=256)
def places(common: Layout, own: Layout) -> Places | None:
    """Return where the values of `own` lie in a common vector, [own.size]; None: everywhere, in order."""
    if own is common or own == common:
        return None
    starts = {slot.name: (slot, start) for slot, start in zip(common.slots, common.offsets, strict=True)}
    found = []
    for part in own.slots:
        slot, start = starts[part.name]
        inside = np.arange(slot.size).reshape(slot.shape)[tuple(slice(size) for size in part.shape)]
        found.append(start + inside.reshape(-1))
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def by_layout(common: Layout, clients: Sequence[Client]) -> dict[Layout, list[ClientId]]:
    """Return the clients by the layout of what they hold of a common one."""
    holders: dict[Layout, list[ClientId]] = {}
    for client in clients:
        holders.setdefault(own_layout(common, client.capacity), []).append(client.id)
    return holders


def gather(common: Layout, own: Layout, vector: Vector) -> Vector:
    """Return the held values of a common vector: itself where everything is held. [common.size] -> [own.size]"""
    where = places(common, own)
    return vector if where is None else vector[where]


def scatter(common: Layout, own: Layout, values: Vector) -> Vector:
    """Return held values in their places, NaN elsewhere: themselves where everything is held. [own.size] ->
    [common.size]"""
    return in_place(common.size, places(common, own), values)


def in_place(size: int, where: Places | None, values: Vector) -> Vector:
    """Return values in their places of a common vector, NaN elsewhere: themselves where they are everywhere (None).
    [held] -> [size]"""
    if where is None:
        return values
    vector = np.full(size, np.nan, np.float32)
    vector[where] = values
    return vector


def block_of(slot: Slot) -> int:
    """Return the index of the block that an intervention's slot belongs to: its module is BLOCKS.INDEX.WHERE."""
    return int(slot.module.rsplit(".", 2)[-2])


def held_by_any(size: int, held: Sequence[Places | None]) -> npt.NDArray[np.bool_] | None:
    """Return which values of the common vector some client holds, [size]; None: all of them.

    Args:
        size: of the common vector.
        held: where each client's values lie in it; None: everywhere.
    """
    if any(where is None for where in held):
        return None
    found = np.zeros(size, bool)
    for where in held:
        found[where] = True
    return found


def held_mean(
    previous: Vector, held: Sequence[tuple[Places | None, Vector]], weights: Sequence[float], least: float = 0.0
) -> Vector:
    """Return the weighted mean of each value over the clients that hold it; the previous value where no
    client does. [d]

    Args:
        previous: the common vector before, [d].
        held: where each client's values lie in the common vector (None: everywhere), and the values.
        weights: how much each client counts.
        least: a value whose holders count for less than this in sum keeps its previous value, too.
    """
    if sum(weights) >= least and all(where is None for where, _ in held):
        return weighted_mean(np.stack([vector for _, vector in held]), np.asarray(weights)) if held else previous
    total, weight = np.zeros(previous.size), np.zeros(previous.size)
    for (where, vector), share in zip(held, weights, strict=True):
        own = slice(None) if where is None else where
        total[own] += share * vector.astype(np.float64)
        weight[own] += share
    counted = (weight > 0) & (weight >= least)
    return np.where(counted, total / np.where(counted, weight, 1), previous).astype(np.float32)
