"""Whose examples a fused forward pass reads: several clients' batches, one after another, each on a member of its own.

All members have equally many rows and tokens in the pass, [members · rows, tokens, ...]: what a member's own batch
lacks is filled up, and does not count.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClientBatch:
    """One pass.

    slots: each member's place among all that could have taken part.
    shapes: each member's own (examples, tokens).
    rows: examples of every member in the pass, at least its own.
    keys: each member's dropout key; not needed when evaluating.
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
        """Boolean [members · rows]: False at rows that only fill up; None where there are none."""
        if all(rows == self.rows for rows, _ in self.shapes):
            return None
        place = torch.arange(self.rows)
        return torch.cat([place < rows for rows, _ in self.shapes]).to(self.device)

    def mask(self, x: Tensor, shapes: Sequence[Sequence[int]], draw: Callable[[int, Sequence[int]], Tensor]) -> Tensor:
        """Return a boolean mask of x's shape, drawn for every member in its own shape, False elsewhere.

        x: [members · n, ..., d], each member's n rows together. shapes: each member's own, without d.
        draw: a boolean tensor from a key and a shape.
        """
        whole = torch.zeros((self.count, len(x) // self.count, *x.shape[1:]), dtype=torch.bool, device=x.device)
        for member, key, shape in zip(whole, self.keys, shapes, strict=True):
            member[tuple(slice(size) for size in shape)] = draw(key, (*shape, x.shape[-1]))
        return whole.reshape(x.shape)


@dataclass(frozen=True)
class Spread:
    """Selected tokens, ragged over the members, as a rectangle.

    index: [members · n] into [members · rows · tokens], each member's together and filled up to the longest's n.
    own: which of these are selected, in the order of the selection; None: all.
    counts: how many each member selected.
    """

    index: Tensor
    own: Tensor | None
    counts: tuple[int, ...]


def spread(index: Tensor, members: ClientBatch, tokens: int) -> Spread:
    """Lay a selection (ascending indices into [members · rows · tokens]) out as a rectangle. A member is filled up from
    its own tokens: what is not finite on another must not reach it."""
    if members.count == 1:
        return Spread(index, None, (len(index),))
    member = index // (members.rows * tokens)
    counts = torch.bincount(member, minlength=members.count)
    sizes = tuple(counts.tolist())
    longest = max(sizes)
    if min(sizes) == longest:
        return Spread(index, None, sizes)
    every = torch.arange(len(index), device=index.device)
    own = member * longest + every - (counts.cumsum(0) - counts)[member]
    first = torch.arange(members.count, device=index.device) * members.rows * tokens
    return Spread(first.repeat_interleave(longest).index_copy(0, own, index), own, sizes)
