"""An adapter as methods see it: named groups of parameters inside a frozen model, each one flat vector."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from torch import nn

from fedray.adapters.context import ForwardContext
from fedray.adapters.group import Entry, Group
from fedray.adapters.layout import Layout
from fedray.errors import choices, nearest
from fedray.types import Vector

if TYPE_CHECKING:
    from fedray.adapters.branched import BranchedLinear

Rows = Mapping[str, npt.NDArray[np.int64]]


@dataclass(frozen=True)
class TrainableGroup:
    """Parameters that train together. weight_decay: whether weight decay may act on them (never on a raw rotation)."""

    name: str
    parameters: tuple[nn.Parameter, ...]
    weight_decay: bool


class Adapter:
    """The adapter of one model.

    Groups: "lora" (trained branch), "rest" (frozen second branch), "mixer" (its weights), "reft" (interventions),
    "head" (task head), "full" (every parameter of the base model); an adapter has those that its method attached.
    Layouts and counts also work on a model on the meta device; `read` and `load` need values.

    Args:
        model: the model with the adapter's modules in it.
        groups: by name, in a fixed order.
        context: shared with the adapter's modules.
        targets: LoRA layers by their path in the model.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        context: ForwardContext,
        targets: "Mapping[str, BranchedLinear] | None" = None,
    ):
        self.model = model
        self.targets: Mapping[str, BranchedLinear] = targets or {}
        self._groups = {group.name: group for group in groups}
        self._context = context

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._groups)

    def layout(self, name: str) -> Layout:
        """Return the layout of a group. Raises KeyError, naming the groups there are."""
        return self._group(name).layout

    def read(self, name: str) -> Vector:
        """Return a copy of a group's values, [layout(name).size]."""
        return self._group(name).read()

    def load(self, name: str, vector: Vector) -> None:
        """Copy a vector into a group.

        Raises:
            ValueError: wrong length, or a value that is not finite.
        """
        self._group(name).load(vector)

    def tensors(self) -> dict[str, Vector]:
        """Return every slot of every group by "group.module.part"."""
        return {
            f"{group.name}.{name}": view
            for group in self._groups.values()
            for name, view in group.layout.views(group.read()).items()
        }

    def set_trainable(self, *names: str) -> None:
        """Let exactly these groups train. "lora.B" is only the slots of part B of the group "lora" (FFA-LoRA)."""
        chosen = {id(entry.parameter) for name in names for entry in self._selected(name)}
        for group in self._groups.values():
            for parameter in group.parameters():
                parameter.requires_grad_(id(parameter) in chosen)
                parameter.grad = None

    def trainable_groups(self) -> list[TrainableGroup]:
        """Return what trains, at most two entries per group: with and without weight decay."""
        found = []
        for group in self._groups.values():
            for decays in (True, False):
                parameters = tuple(
                    entry.parameter
                    for entry in group.entries
                    if entry.parameter.requires_grad and entry.decays == decays
                )
                if parameters:
                    found.append(TrainableGroup(group.name, parameters, decays))
        return found

    def num_trainable(self) -> int:
        """Return how many parameters train."""
        return sum(parameter.numel() for group in self.trainable_groups() for parameter in group.parameters)

    def set_dropout_key(self, key: int) -> None:
        """Key the dropout masks of the following forward passes; set it anew for every micro-batch."""
        self._context.dropout_key = key

    def set_rows(self, rows: Rows | None) -> None:
        """Let only some rows of every B exist (FedHFT's `pre` masks): B becomes [m, r], its output is scattered into
        d_out. The values of the kept rows stay; rows that come (back) are zero. None restores the whole B.

        Parameters and layout("lora") are new afterwards.

        Args:
            rows: by target path, sorted distinct row indices below d_out.

        Raises:
            ValueError: the paths are not exactly the targets', or the indices are not as described.
        """
        if rows is not None and set(rows) != set(self.targets):
            raise ValueError(f"rows for {choices(sorted(rows))}; the targets are {choices(self.targets)}")
        for path, layer in self.targets.items():
            layer.set_rows(None if rows is None else rows[path])
        self._groups["lora"] = Group(
            "lora", (entry for path, layer in self.targets.items() for entry in layer.own_entries(path))
        )

    def mixer_mean(self) -> float | None:
        """Return the mean α_L over layers and non-padding tokens of the forward passes in evaluation mode since the
        last call; None if there were none, or there is no mixer."""
        return self._context.take_mixer_mean()

    def _group(self, name: str) -> Group:
        if name not in self._groups:
            raise KeyError(f"no group {name!r}{nearest(name, self._groups)}; this adapter has {choices(self._groups)}")
        return self._groups[name]

    def _selected(self, name: str) -> list[Entry]:
        group_name, _, part = name.partition(".")
        entries = [entry for entry in self._group(group_name).entries if part in ("", entry.slot.part)]
        if not entries:
            raise KeyError(f"group {group_name!r} has no part {part!r}")
        return entries
