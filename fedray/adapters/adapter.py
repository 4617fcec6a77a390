"""An adapter as methods see it: named groups of parameters inside a frozen model, each one flat vector."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import nn

from fedray.adapters.context import ForwardContext
from fedray.adapters.group import Entry, Group
from fedray.adapters.layout import Layout
from fedray.errors import TrainingError, choices, nearest
from fedray.types import Capacity, Vector

if TYPE_CHECKING:
    from fedray.adapters.branched import BranchedLinear
    from fedray.adapters.reft import Place

Rows = Mapping[str, npt.NDArray[np.int64]]
Gathering = Callable[[Sequence[nn.Parameter], bool], AbstractContextManager[Any]]
"""Given parameters and whether they will be written: a context in which they have their values (`Adapter.bind`)."""


@dataclass(frozen=True)
class TrainableGroup:
    """Parameters that train together.

    Attributes:
        name: the group's.
        parameters: in the order of the group's layout.
        weight_decay: whether weight decay may act on them (never on a raw rotation).
    """

    name: str
    parameters: tuple[nn.Parameter, ...]
    weight_decay: bool


class Adapter:
    """The adapter of one model.

    "GROUP.PART" names the slots of one part of a group wherever a group is named: "lora.B" is B of every LoRA.

    Groups of the built-in adapters: "lora" (first branch), "rest" (second branch), "mixer" (what weighs them), "gate"
    (similarity to a client's examples), "core" and "frames" (R, and B and A around it), "reft" (interventions), "full"
    (every parameter of the base model), "head" (task head, of every adapter whose model has one). Layouts and counts
    also work on a model on the meta device; `read` and `load` need values.

    Args:
        model: the model with the adapter's modules in it.
        groups: by name, in a fixed order.
        context: shared with the adapter's modules.
        targets: LoRA layers by their path in the model.
        places: interventions by their block's path and the kind of position.

    Attributes:
        fit_capacity: set by a method whose adapter has fewer parameters on a tier that holds less. It is called with
            the adapter and the tier's capacity before an engine holds the parameters, whose shapes stay from then on.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        context: ForwardContext,
        targets: "Mapping[str, BranchedLinear] | None" = None,
        places: "Mapping[str, Place] | None" = None,
    ):
        self.model = model
        self.targets: Mapping[str, BranchedLinear] = targets or {}
        self.places: Mapping[str, Place] = places or {}
        self.fit_capacity: Callable[[Adapter, Capacity], None] | None = None
        self._groups = {group.name: group for group in groups}
        self._whole = {group.name: group.layout for group in groups}
        self._context = context
        self._gathering: Gathering | None = None
        self._settled = False

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._groups)

    @property
    def groups(self) -> tuple[Group, ...]:
        return tuple(self._groups.values())

    @property
    def context(self) -> ForwardContext:
        """What the adapter's modules share."""
        return self._context

    def layout(self, name: str) -> Layout:
        """Return the layout of a group, or of a part of one.

        Raises:
            KeyError: there is no such group or part; the message names those that there are.
        """
        return self._group(name).layout

    def whole_layout(self, name: str) -> Layout:
        """Return the layout of a group with all rows of every B, whichever exist now (`set_rows`)."""
        self._group(name)
        return self._whole[name]

    def read(self, name: str) -> Vector:
        """Return a copy of a group's values, [layout(name).size]."""
        group = self._group(name)
        with self._gathered(group.parameters(), False):
            return group.read()

    def load(self, name: str, vector: Vector) -> None:
        """Copy a vector into a group.

        Raises:
            ValueError: wrong length, or a value that is not finite.
        """
        group = self._group(name)
        with self._gathered(group.parameters(), True):
            group.load(vector)

    def tensors(self) -> dict[str, Vector]:
        """Return every slot of every group by "group.module.part". Rows of B that do not exist are zero."""
        found = {
            f"{name}.{slot}": view
            for name, group in self._groups.items()
            for slot, view in group.layout.views(self.read(name)).items()
        }
        for path, layer in self.targets.items():
            if layer.rows is not None:
                kept = found[f"lora.{path}.B"]
                whole = np.zeros((layer.d_out, kept.shape[1]), np.float32)
                whole[layer.rows] = kept
                found[f"lora.{path}.B"] = whole
        return found

    def fit(self, capacity: Capacity) -> None:
        """Give the parameters the shapes that a tier of this capacity holds; see `fit_capacity`."""
        if self.fit_capacity is not None:
            self.fit_capacity(self, capacity)

    def bind(self, gathering: Gathering | None) -> None:
        """Give the parameters to an engine. Until they are released, no parameter is replaced, and values are read and
        written within the engine's context.

        Args:
            gathering: makes that context; None releases the parameters.
        """
        self._gathering = gathering

    def set_trainable(self, *names: str) -> None:
        """Train exactly the named groups.

        Args:
            names: of groups, or of parts of groups.

        Raises:
            KeyError: there is no such group or part.
            TrainingError: what trains is settled.
        """
        if self._settled:
            raise TrainingError(
                "set_trainable() is for the method's attach(), which declares all that ever trains; to train a part of "
                "that in train_client, call local.train(parts=[...])"
            )
        chosen = {id(entry.parameter) for name in names for entry in self.entries(name)}
        for group in self._groups.values():
            for parameter in group.parameters():
                parameter.requires_grad_(id(parameter) in chosen)
                parameter.grad = None

    def settle(self) -> None:
        """Fix what trains, for which an engine, a stack of adapters or a count is made: `set_trainable` is refused from
        now on."""
        self._settled = True

    @contextmanager
    def narrowed(self, parts: Sequence[str] | None) -> Iterator[None]:
        """Within, only some of what trains does; everything else has no gradient.

        Args:
            parts: names as in `set_trainable`; None: all that trains.

        Raises:
            KeyError: there is no such group or part.
            TrainingError: one of the parts does not train.
        """
        if parts is None:
            yield
            return
        chosen = {name: self.entries(name) for name in parts}
        frozen = [name for name in parts if not all(entry.parameter.requires_grad for entry in chosen[name])]
        if frozen or not parts:
            what = f"not declared to train: {choices(frozen)}" if parts else "names nothing"
            raise TrainingError(
                f"train(parts={list(parts)}): {what}; name some of what the method's attach() gives to set_trainable()"
            )
        moving = {id(entry.parameter) for entries in chosen.values() for entry in entries}
        parameters = [parameter for group in self._groups.values() for parameter in group.parameters()]
        resting = [parameter for parameter in parameters if parameter.requires_grad and id(parameter) not in moving]
        for parameter in resting:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in resting:
                parameter.requires_grad_(True)

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

    def base_group(self) -> str | None:
        """Return the first group of the base model's own parameters; None: everything but the head is inserted."""
        return next((name for name, group in self._groups.items() if group.draw is None and name != "head"), None)

    def num_trainable(self) -> int:
        """Return how many parameters train."""
        return sum(self.training_sizes().values())

    def training_sizes(self) -> dict[str, int]:
        """Return how many values every slot has that trains, by "group.module.part"."""
        return {
            f"{group.name}.{entry.slot.name}": entry.slot.size
            for group in self._groups.values()
            for entry in group.entries
            if entry.parameter.requires_grad
        }

    def entries(self, name: str) -> tuple[Entry, ...]:
        """Return the entries of a group or of a part, in the order of its layout.

        Raises:
            KeyError: there is no such group or part.
        """
        return self._group(name).entries

    def set_dropout_key(self, key: int) -> None:
        """Key the dropout masks of the following forward passes; set it anew for every micro-batch."""
        self._context.dropout_key = key

    def set_rows(self, rows: Rows | None) -> None:
        """Keep only some rows of every B (FedHFT's `pre` masks): B becomes [m, r], its output is scattered into d_out.
        The values of the kept rows stay; rows that come (back) are zero. None restores the whole B.

        Where the number of rows changes, parameters and layout("lora") are new afterwards.

        Args:
            rows: by target path, sorted distinct row indices below d_out.

        Raises:
            ValueError: the paths are not exactly the targets', the indices are not as described, or their number
                changes while an engine holds the parameters.
        """
        if rows is not None and set(rows) != set(self.targets):
            raise ValueError(f"rows for {choices(sorted(rows))}; the targets are {choices(self.targets)}")
        if self._gathering is not None:
            for path, layer in self.targets.items():
                wanted = layer.d_out if rows is None else len(rows[path])
                if wanted != layer.num_rows:
                    raise ValueError(f"{wanted} rows of {path}, but the engine was made for {layer.num_rows}")
        with self._gathered([layer.own_b for layer in self.targets.values()], True):
            replaced = [layer.set_rows(None if rows is None else rows[path]) for path, layer in self.targets.items()]
        if any(replaced):
            entries = (entry for path, layer in self.targets.items() for entry in layer.own_entries(path))
            self._groups["lora"] = Group("lora", entries, self._groups["lora"].draw)

    def observed(self) -> dict[str, float]:
        """Return, by name, the mean of what the adapter's modules observed in evaluation mode since the last call, over
        modules and non-padding tokens (`ForwardContext.observe`)."""
        return self._context.take_observed()

    def _gathered(self, parameters: Sequence[nn.Parameter], writing: bool) -> AbstractContextManager[Any]:
        return nullcontext() if self._gathering is None else self._gathering(parameters, writing)

    def _group(self, name: str) -> Group:
        """Return a group, or the part of a group that "GROUP.PART" names."""
        group_name, _, part = name.partition(".")
        if group_name not in self._groups:
            known = choices(self._groups)
            raise KeyError(f"no group {group_name!r}{nearest(group_name, self._groups)}; this adapter has {known}")
        group = self._groups[group_name]
        return group.part(part) if part else group
