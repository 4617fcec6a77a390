"""One flat vector with an immutable layout: the only form in which adapter state travels or is aggregated."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from fedray.types import Vector, state_type

Part = str
"""Role of a tensor. A, B: LoRA factors, of which a tier may hold fewer components (`lora_rank`). R, W, b: LoReFT's and
DiReFT's rotation, source, bias. P: the free projection of NoReFT and NodiReFT. G, w_R, w_L, present: mixers. v: gate.
core: Fed-SB's R. tensor: anything else. An adapter kind may add parts of its own, under other names."""


@state_type("Slot", "fedray.adapters.layout.Slot")
@dataclass(frozen=True)
class Slot:
    """One tensor's place in a vector. Tensors are known by module and part, never by a substring of a name.

    Attributes:
        module: the module's path in the backbone.
        part: the tensor's role there.
        shape: of the tensor.
    """

    module: str
    part: Part
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.module}.{self.part}"

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@state_type("Layout", "fedray.adapters.layout.Layout")
@dataclass(frozen=True)
class Layout:
    """The slots of a vector, in order and without gaps."""

    slots: tuple[Slot, ...]

    @cached_property
    def size(self) -> int:
        return sum(slot.size for slot in self.slots)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Start of each slot in the vector."""
        starts, start = [], 0
        for slot in self.slots:
            starts.append(start)
            start += slot.size
        return tuple(starts)

    def flatten(self, tensors: Mapping[str, npt.NDArray[np.generic]]) -> Vector:
        """Pack tensors (by slot name) into a new float32 vector of shape [size].

        Raises:
            ValueError: a tensor is missing, unknown, or of another shape than its slot.
        """
        unknown = set(tensors) - {slot.name for slot in self.slots}
        if unknown:
            raise ValueError(f"tensors without a slot: {sorted(unknown)}")
        vector = np.empty(self.size, dtype=np.float32)
        for slot, start in zip(self.slots, self.offsets, strict=True):
            if slot.name not in tensors:
                raise ValueError(f"no tensor for slot {slot.name!r}")
            if tensors[slot.name].shape != slot.shape:
                raise ValueError(f"slot {slot.name!r} has shape {slot.shape}, the tensor {tensors[slot.name].shape}")
            vector[start : start + slot.size] = tensors[slot.name].reshape(-1)
        return vector

    def views(self, vector: Vector) -> dict[str, Vector]:
        """Return each slot's tensor by name, as a view into `vector` (writing to it writes to the vector).

        Raises:
            ValueError: the vector's length is not `size`.
        """
        return {slot.name: view for slot, view in self.items(vector)}

    def items(self, vector: Vector) -> list[tuple[Slot, Vector]]:
        """Return (slot, view) pairs in layout order.

        Raises:
            ValueError: the vector's length is not `size`.
        """
        if vector.shape != (self.size,):
            raise ValueError(f"this layout has {self.size} values, the vector has shape {vector.shape}")
        return [
            (slot, vector[start : start + slot.size].reshape(slot.shape))
            for slot, start in zip(self.slots, self.offsets, strict=True)
        ]

    def part(self, part: Part) -> "Layout":
        """Return the layout of the slots of one part, for example of all A."""
        return Layout(tuple(slot for slot in self.slots if slot.part == part))

    def mask(self, parts: set[Part]) -> npt.NDArray[np.bool_]:
        """Return a boolean vector of shape [size]: True where the slot's part is one of `parts`."""
        return np.concatenate(
            [np.full(slot.size, slot.part in parts) for slot in self.slots] or [np.zeros(0, dtype=bool)]
        )
