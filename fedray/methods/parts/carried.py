"""Sums of low-rank updates that the server carries along, since nothing is ever merged into the base weights.

A carried sum has one matrix per target, in units without the scale s, like the products B A that it adds up. It goes
down whole, so that a client that missed rounds needs nothing else, and acts in the frozen second branch "rest", which
has the scale s of the first one and sees the same input without dropout.
"""

from collections.abc import Callable, Iterable

import numpy as np
from torch import nn

from fedray.adapters.adapter import Adapter
from fedray.adapters.lora import attach_lora
from fedray.aggregation.low_rank import LowRank, concatenate, relative_error, truncate
from fedray.config import LoraSection
from fedray.methods.parts.factors import Delta, split
from fedray.types import Vector

Keep = Callable[[LowRank], tuple[LowRank, float]]
"""How a sum is held: what is kept of it, and the relative error of that."""


def grow(sums: Delta, updates: Iterable[LowRank], keep: Keep) -> tuple[Delta, float]:
    """Return each target's sum with its update added, held as `keep` says, and the largest relative error of that.

    An update of rank 0 leaves its target as it is, bit for bit.
    """
    grown, error = [], 0.0
    for old, update in zip(sums, updates, strict=True):
        if update.rank == 0:
            grown.append(old)
            continue
        held, lost = keep(concatenate([(1.0, old), (1.0, update)]))
        grown.append(held)
        error = max(error, lost)
    return tuple(grown), error


def cut(x: LowRank, rank: int) -> tuple[LowRank, float]:
    """Return the best approximation with `rank` columns, and its relative error."""
    held = truncate(x, rank)
    return held, relative_error(held, x)


def carry(sums: Delta, updates: Iterable[LowRank], carried_rank: int) -> tuple[Delta, float]:
    """Return the carried sums with a round's updates added, and the largest relative error of a truncation.

    Columns are appended while there are at most carried_rank, and never more than min(d_out, d_in), with which every
    matrix is exact. Their number follows from the number of columns that came, not from their values: what is sent has
    the size that is known before training.
    """

    def keep(x: LowRank) -> tuple[LowRank, float]:
        most = min(carried_rank, *x.shape)
        return (x, 0.0) if x.rank <= most else cut(x, most)

    return grow(sums, updates, keep)


def attach(model: nn.Module, section: LoraSection, carried_rank: int) -> Adapter:
    """Put a LoRA on the model, with a second branch "rest" that holds any sum of `carry`.

    Raises: as `attach_lora`.
    """
    return attach_lora(model, section, rest_rank=carried_rank, clip_rest=True, rest_dropout=False, mixer=None)


def load(adapter: Adapter, carried: Delta) -> None:
    """Load a carried sum into the adapter's second branch, filled up with zeros."""
    layout = adapter.layout("rest")
    rest: Vector = np.zeros(layout.size, np.float32)
    for branch, x in zip(split(layout, rest), carried, strict=True):
        branch.B[:, : x.rank] = x.B
        branch.A[: x.rank] = x.A
    adapter.load("rest", rest)
