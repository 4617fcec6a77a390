"""A client batch: the clients, its members, whose examples one forward pass reads together.

All members have equally many rows and tokens in the pass, [members · rows, tokens, ...]: smaller batches are padded,
and padding does not count.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


class CannotBatch(Exception):
    """Why these clients can only be trained one by one."""


@dataclass(frozen=True)
class ClientBatch:
    """The members of one forward pass.

    Attributes:
        slots: each member's place in the stack of adapters (`fedray.adapters.stacked`).
        shapes: each member's own (examples, tokens).
        rows: rows of every member in the pass, at least its own examples.
        device: where the pass is computed.
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

    @property
    def tokens(self) -> int:
        """How many tokens every row has."""
        return max(tokens for _, tokens in self.shapes)

    @cached_property
    def real(self) -> Tensor | None:
        """Boolean [members · rows]: False at padding rows; None: there are none."""
        if all(rows == self.rows for rows, _ in self.shapes):
            return None
        place = torch.arange(self.rows)
        return torch.cat([place < rows for rows, _ in self.shapes]).to(self.device)

    def mask(self, x: Tensor, shapes: Sequence[Sequence[int]], draw: Callable[[int, Sequence[int]], Tensor]) -> Tensor:
        """Return a boolean mask of x's shape, drawn for every member in its own shape, False elsewhere.

        Args:
            x: [members · n, ..., d], each member's n rows together.
            shapes: each member's own, without d.
            draw: makes a boolean tensor from a key and a shape.
        """
        whole = torch.zeros((self.count, len(x) // self.count, *x.shape[1:]), dtype=torch.bool, device=x.device)
        for member, key, shape in zip(whole, self.keys, shapes, strict=True):
            member[tuple(slice(size) for size in shape)] = draw(key, (*shape, x.shape[-1]))
        return whole.reshape(x.shape)


@dataclass(frozen=True)
class Spread:
    """Selected tokens, of which members have unequal numbers, as a rectangle.

    Attributes:
        index: [members · n] into [members · rows · tokens], each member's together and padded to the largest number n.
        own: which of these are selected, in the order of the selection; None: all.
        counts: how many tokens each member selected.
    """

    index: Tensor
    own: Tensor | None
    counts: tuple[int, ...]


def spread(index: Tensor, members: ClientBatch, tokens: int) -> Spread:
    """Lay a selection out as a rectangle. A member is padded with its own tokens: values that are not finite on another
    member must not reach it.

    Args:
        index: ascending indices into [members · rows · tokens].
        members: of the pass.
        tokens: per row of the pass.
    """
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
