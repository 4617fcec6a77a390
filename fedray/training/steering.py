"""Steering: a gradient of the method's own that is added to the loss's in every step, before clipping.

A steering is a value that a method passes to `local.train`. Its vectors are given by the names of `Adapter.read`:
"lora", "head", or a part such as "lora.B". What has no vector is not steered. Every kind has one gradient function over
several clients, one row each; a client that trains alone is one row.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedray.adapters.adapter import Adapter
from fedray.adapters.layout import Layout, Slot
from fedray.adapters.reft import RotationEntry
from fedray.errors import TrainingError, choices
from fedray.types import Vector


class Steering(ABC):
    """What is added to the gradient of everything that trains."""

    @property
    @abstractmethod
    def vectors(self) -> Mapping[str, Vector] | None:
        """One vector per group or part; None: the kind has none."""

    @staticmethod
    @abstractmethod
    def gradient(steerings: Sequence[Any], values: Tensor, vectors: Tensor, slots: Sequence[Slot]) -> Tensor:
        """Return what is added, [members, d].

        Args:
            steerings: of each member, all of one kind.
            values: what trains, [members, d].
            vectors: the members' vectors, [members, d]; zero where there is none.
            slots: what the columns hold, one slot after another.
        """


@dataclass(frozen=True)
class Proximal(Steering):
    """weight · (θ − anchor), the gradient of weight/2 · ‖θ − anchor‖² (FedProx, Ditto)."""

    anchor: Mapping[str, Vector]
    weight: float

    @property
    def vectors(self) -> Mapping[str, Vector]:
        return self.anchor

    @staticmethod
    def gradient(steerings: Sequence["Proximal"], values: Tensor, vectors: Tensor, slots: Sequence[Slot]) -> Tensor:
        return (values - vectors).mul_(_column([steering.weight for steering in steerings], values))


@dataclass(frozen=True)
class Shift(Steering):
    """A constant (SCAFFOLD's c − c_k)."""

    by: Mapping[str, Vector]

    @property
    def vectors(self) -> Mapping[str, Vector]:
        return self.by

    @staticmethod
    def gradient(steerings: Sequence["Shift"], values: Tensor, vectors: Tensor, slots: Sequence[Slot]) -> Tensor:
        return vectors


@dataclass(frozen=True)
class Tail(Steering):
    """The gradient of weight · Σ ‖A[keep:]‖ ‖B[:, keep:]‖ over the targets (HetLoRA, arXiv 2401.06432): with the tails
    A_t and B_t it is weight · ‖B_t‖ A_t / ‖A_t‖ and vice versa, 0 where a norm is 0.

    Attributes:
        keep: components before the tail.
        weight: λ.
    """

    keep: int
    weight: float

    @property
    def vectors(self) -> None:
        return None

    @staticmethod
    def gradient(steerings: Sequence["Tail"], values: Tensor, vectors: Tensor, slots: Sequence[Slot]) -> Tensor:
        weights = _column([steering.weight for steering in steerings], values)
        keep = _column([steering.keep for steering in steerings], values)
        added, places = torch.zeros_like(values), {}
        for slot, start in zip(slots, Layout(tuple(slots)).offsets, strict=True):
            places[slot.name] = slot, slice(start, start + slot.size)
        for module in _pairs(slots):
            (slot_a, at_a), (slot_b, at_b) = places[f"{module}.A"], places[f"{module}.B"]
            tail = (torch.arange(slot_a.shape[0], device=values.device) >= keep).to(values.dtype)  # [members, r]
            a = values[:, at_a].view(-1, *slot_a.shape) * tail[:, :, None]
            b = values[:, at_b].view(-1, *slot_b.shape) * tail[:, None, :]
            norm_a, norm_b = (part.flatten(1).norm(dim=1, keepdim=True) for part in (a, b))
            added[:, at_a] = weights * _ratio(norm_b, norm_a) * a.flatten(1)
            added[:, at_b] = weights * _ratio(norm_a, norm_b) * b.flatten(1)
        return added


def check_steering(adapter: Adapter, steering: Steering | None, mean_gradient: bool) -> None:
    """Check that what trains now can be steered, or its gradients returned.

    Raises:
        KeyError: a vector of a group or part that the adapter does not have.
        TrainingError: a vector of another length, a steering that needs more than what trains, or a rotation: its raw
            parameter is another tensor than what is read and loaded.
    """
    vectors = (steering and steering.vectors) or {}
    for name, vector in vectors.items():
        size = sum(entry.slot.size for entry in adapter.entries(name))
        if vector.shape != (size,):
            raise TrainingError(f"train(steering=...): {name!r} has {size} values, the vector has shape {vector.shape}")
    training = _training(adapter)
    if isinstance(steering, Tail):
        _pairs([slot for _, slot, _ in training])
    for group, slot, rotates in training:
        if rotates and (mean_gradient or {group, f"{group}.{slot.part}"} & vectors.keys()):
            asked = "mean_gradient" if mean_gradient else "steering"
            raise TrainingError(
                f"train({asked}=...): {group}.{slot.name} is a rotation, whose gradient is that of its raw parameter; "
                "use adapter: lora, or a kind of LoReFT without rotation (reft.kind: noreft or nodireft)"
            )


class Steered:
    """Steers the gradients of members that train what the adapter trains now, and sums them up if their mean is asked
    for.

    Args:
        adapter: with exactly that trainable which trains in this call.
        steerings: of each member, all of one kind, or all None.
        mean_gradient: whether `means` is asked for.
    """

    def __init__(self, adapter: Adapter, steerings: Sequence[Steering | None], mean_gradient: bool) -> None:
        self._steerings = steerings
        self._parameters = [parameter for group in adapter.trainable_groups() for parameter in group.parameters]
        training = _training(adapter)
        self._slots = [slot for _, slot, _ in training]
        self._groups = [group for group, _, _ in training]
        self._layouts = {name: adapter.layout(name) for name in adapter.names}
        self._sizes = [slot.size for slot in self._slots]
        self._vectors, self._covered = None, None
        device = self._parameters[0].device
        if steerings[0] is not None:
            given = [_in_order(adapter, steering) for steering in steerings if steering is not None]
            self._vectors = torch.from_numpy(np.stack([vector for vector, _ in given])).to(device)
            covered = np.stack([covered for _, covered in given])
            self._covered = None if covered.all() else torch.from_numpy(covered).to(device)
        shape = (len(steerings), sum(self._sizes))
        self._total = torch.zeros(shape, device=device) if mean_gradient else None
        self._steps = np.zeros(len(steerings), np.int64)

    @classmethod
    def of(cls, adapter: Adapter, steerings: Sequence[Steering | None], mean_gradient: bool) -> Self | None:
        """Return what steers, or None if there is nothing to do."""
        return cls(adapter, steerings, mean_gradient) if mean_gradient or steerings[0] is not None else None

    def __call__(self) -> None:
        """Steer the gradients that the adapter's parameters hold. A parameter without a gradient keeps none."""
        held = [p.grad is not None for p in self._parameters]
        with torch.no_grad():
            flat = [p.new_zeros(p.numel()) if p.grad is None else p.grad.reshape(-1) for p in self._parameters]
            gradients, values = torch.cat(flat), torch.cat([p.reshape(-1) for p in self._parameters])
            self.steer(gradients[None], values[None], np.array([held]))
            for parameter, piece in zip(self._parameters, torch.split(gradients, self._sizes), strict=True):
                if parameter.grad is not None:
                    parameter.grad.copy_(piece.view_as(parameter))

    def steer(self, gradients: Tensor, values: Tensor, present: npt.NDArray[np.bool_] | None) -> None:
        """Steer the gradients of the first members, in place.

        Args:
            gradients: [members, d].
            values: [members, d].
            present: which parameters have a gradient, [members, parameters]; None: all. Others are not steered.
        """
        members = len(gradients)
        self._steps[:members] += 1
        if self._total is not None:
            self._total[:members] += gradients
        if self._vectors is None:
            return
        kind: Any = type(self._steerings[0])
        added = kind.gradient(self._steerings[:members], values, self._vectors[:members], self._slots)
        if self._covered is not None:
            added = added * self._covered[:members]
        if present is not None and not present.all():
            sizes = torch.tensor(self._sizes, device=added.device)
            added = added * torch.from_numpy(present).to(added.device).repeat_interleave(sizes, dim=1)
        gradients += added

    def means(self) -> list[dict[str, Vector]]:
        """Return every member's mean gradient before steering by group, zero where nothing trains; nothing where it
        was not asked for."""
        if self._total is None:
            return [{} for _ in self._steps]
        return [
            self._by_group(total / max(steps, 1))
            for total, steps in zip(self._total.cpu().numpy(), self._steps.tolist(), strict=True)
        ]

    def _by_group(self, values: Vector) -> dict[str, Vector]:
        found = {name: np.zeros(layout.size, np.float32) for name, layout in self._layouts.items()}
        views = {name: layout.views(found[name]) for name, layout in self._layouts.items()}
        pieces = np.split(values, np.cumsum(self._sizes)[:-1])
        for group, slot, piece in zip(self._groups, self._slots, pieces, strict=True):
            views[group][slot.name][...] = piece.reshape(slot.shape)
        return found


def _training(adapter: Adapter) -> list[tuple[str, Slot, bool]]:
    """Return group, slot, and whether it is a rotation, of every parameter that trains, in the order of
    `trainable_groups`."""
    held = {
        id(entry.parameter): (group.name, entry.slot, isinstance(entry, RotationEntry))
        for group in adapter.groups
        for entry in group.entries
    }
    return [held[id(parameter)] for group in adapter.trainable_groups() for parameter in group.parameters]


def _in_order(adapter: Adapter, steering: Steering) -> tuple[Vector, npt.NDArray[np.bool_]]:
    """Return a steering's vectors as one in the order of what trains, zero where there is none, and what it steers."""
    pieces: dict[int, Vector] = {}
    for name, vector in (steering.vectors or {}).items():
        entries = adapter.entries(name)
        cuts = np.cumsum([entry.slot.size for entry in entries])[:-1]
        pieces |= {id(entry.parameter): piece for entry, piece in zip(entries, np.split(vector, cuts), strict=True)}
    parameters = [parameter for group in adapter.trainable_groups() for parameter in group.parameters]
    everywhere = steering.vectors is None
    values = [pieces.get(id(p), np.zeros(p.numel(), np.float32)) for p in parameters]
    covered = [np.full(p.numel(), everywhere or id(p) in pieces) for p in parameters]
    return np.concatenate(values).astype(np.float32, copy=False), np.concatenate(covered)


def _pairs(slots: Sequence[Slot]) -> list[str]:
    """Return the modules of LoRA targets.

    Raises:
        TrainingError: there are none, or one of a target's factors does not train.
    """
    modules = {part: [slot.module for slot in slots if slot.part == part] for part in ("A", "B")}
    if not modules["A"] or modules["A"] != modules["B"]:
        raise TrainingError(
            "train(steering=Tail(...)): needs both factors of LoRA in training; got "
            f"{choices(sorted({slot.part for slot in slots}))}"
        )
    return modules["A"]


def _column(numbers: Sequence[float], like: Tensor) -> Tensor:
    """[members, 1]"""
    return torch.tensor(numbers, dtype=like.dtype, device=like.device)[:, None]


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """Return above / below, 0 where that is 0."""
    return torch.where(below > 0, above / below, torch.zeros_like(below))
