"""Whose examples a fused forward pass reads: several clients' batches, one after another, each on a lane of its own.

All lanes have equally many rows and tokens in the pass, [lanes · rows, tokens, ...]: what a lane's own batch lacks is
filled up, and does not count.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Lanes:
    """One pass.

    slots: each lane's place among all that could have taken part.
    shapes: each lane's own (examples, tokens).
    rows: examples of every lane in the pass, at least its own.
    keys: each lane's dropout key; not needed when evaluating.
    """

    slots: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]
    rows: int
    device: torch.device | str
    keys: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        return len(self.slots)

    @cached_property
    def real(self) -> Tensor | None:
        """Boolean [lanes · rows]: False at rows that only fill up; None where there are none."""
        if all(rows == self.rows for rows, _ in self.shapes):
            return None
        place = torch.arange(self.rows)
        return torch.cat([place < rows for rows, _ in self.shapes]).to(self.device)

    def mask(self, x: Tensor, shapes: Sequence[Sequence[int]], draw: Callable[[int, Sequence[int]], Tensor]) -> Tensor:
        """Return a boolean mask of x's shape, drawn for every lane in its own shape, False elsewhere.

        x: [lanes · n, ..., d], each lane's n rows together. shapes: each lane's own, without d.
        draw: a boolean tensor from a key and a shape.
        """
        whole = torch.zeros((self.count, len(x) // self.count, *x.shape[1:]), dtype=torch.bool, device=x.device)
        for lane, key, shape in zip(whole, self.keys, shapes, strict=True):
            lane[tuple(slice(size) for size in shape)] = draw(key, (*shape, x.shape[-1]))
        return whole.reshape(x.shape)


@dataclass(frozen=True)
class Spread:
    """Selected tokens, ragged over the lanes, as a rectangle.

    index: [lanes · n] into [lanes · rows · tokens], each lane's together and filled up to the longest's n.
    own: which of these are selected, in the order of the selection; None: all.
    counts: how many each lane selected.
    """

    index: Tensor
    own: Tensor | None
    counts: tuple[int, ...]


def spread(index: Tensor, lanes: Lanes, tokens: int) -> Spread:
    """Lay a selection (ascending indices into [lanes · rows · tokens]) out as a rectangle. A lane is filled up from its
    own tokens: what is not finite on another must not reach it."""
    if lanes.count == 1:
        return Spread(index, None, (len(index),))
    lane = index // (lanes.rows * tokens)
    counts = torch.bincount(lane, minlength=lanes.count)
    sizes = tuple(counts.tolist())
    longest = max(sizes)
    if min(sizes) == longest:
        return Spread(index, None, sizes)
    every = torch.arange(len(index), device=index.device)
    own = lane * longest + every - (counts.cumsum(0) - counts)[lane]
    first = torch.arange(lanes.count, device=index.device) * lanes.rows * tokens
    return Spread(first.repeat_interleave(longest).index_copy(0, own, index), own, sizes)
