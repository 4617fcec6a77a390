"""A named group of adapter parameters, and how it becomes one flat vector and back."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import nn

from fedray.adapters.layout import Layout, Part, Slot
from fedray.types import Vector


@dataclass(frozen=True)
class Entry:
    """One slot and the parameter that holds it.

    Attributes:
        slot: place and shape in the group's vector.
        parameter: in the model.
        decays: whether weight decay may act on the parameter.
    """

    slot: Slot
    parameter: nn.Parameter
    decays: bool = True

    def read(self) -> Vector:
        """Return the slot's tensor in float32; may share memory with the parameter."""
        return np.asarray(self.parameter.detach().float().cpu().numpy())

    def write(self, tensor: Vector) -> None:
        """Copy a tensor into the parameter, in place: an engine may hold its memory, too."""
        self.parameter.data.copy_(torch.from_numpy(tensor))


Draw = Callable[[Layout, int], Vector]
"""Draws the first values of a layout by seed: (layout, seed) -> [layout.size]."""


class Group:
    """Parameters that are read and loaded as one vector, in the order of their layout.

    Args:
        name: unique within the adapter.
        entries: the parameters, by slot.
        draw: draws the first values, the same on every machine; None: the group's parameters are the base model's own,
            and start from the values that the model has.
    """

    def __init__(self, name: str, entries: Iterable[Entry], draw: Draw | None = None):
        self.name = name
        self.entries = tuple(entries)
        self.draw = draw

    @cached_property
    def layout(self) -> Layout:
        return Layout(tuple(entry.slot for entry in self.entries))

    def part(self, part: Part) -> "Group":
        """Return the entries of one part as a group of their own, over the same parameters.

        Raises:
            KeyError: there are none.
        """
        entries = [entry for entry in self.entries if entry.slot.part == part]
        if not entries:
            raise KeyError(f"group {self.name!r} has no part {part!r}")
        return Group(f"{self.name}.{part}", entries, self.draw)

    def first_values(self, seed: int) -> Vector:
        """Return the values that a run starts from, [layout.size]."""
        return self.read() if self.draw is None else self.draw(self.layout, seed)

    def read(self) -> Vector:
        """Return a copy of all values, [layout.size], float32."""
        return self.layout.flatten({entry.slot.name: entry.read() for entry in self.entries})

    def load(self, vector: Vector) -> None:
        """Copy a vector into the parameters.

        Raises:
            ValueError: the vector has not `layout.size` values, or one of them is not finite.
        """
        own = np.array(vector, dtype=np.float32)  # Ray's object store hands out read-only arrays
        views = self.layout.items(own)
        if not np.isfinite(own).all():
            raise ValueError(f"group {self.name!r}: the vector has values that are not finite")
        for entry, (_, view) in zip(self.entries, views, strict=True):
            entry.write(view)

    def parameters(self) -> list[nn.Parameter]:
        return [entry.parameter for entry in self.entries]
