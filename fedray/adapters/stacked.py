"""Several clients' adapters on one model: every parameter of the adapter is a stack with one slice per member of the
client batch, and a forward pass reads all members' examples together (`fedray.adapters.client_batch`).

The frozen base model sees one large batch; where the adapter acts, a batched matrix product gives every member's
examples its own parameters. Nothing is inserted: while `AdapterStack.installed`, the adapter's linear layers and
interventions compute with the stacks instead of their own parameters.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fedray.adapters.adapter import Adapter, TrainableGroup
from fedray.adapters.client_batch import CannotBatch
from fedray.adapters.group import Entry, Group
from fedray.adapters.reft import RotationEntry
from fedray.adapters.rows import keep_rows

if TYPE_CHECKING:
    from fedray.adapters.branched import BranchedLinear


@dataclass(frozen=True)
class Column:
    """The place of one entry in a member's row of values.

    Attributes:
        entry: slot and parameter of the adapter itself.
        group: index of its trainable group in `Adapter.trainable_groups`; None: it does not train.
        start: index of its first value.
        stop: index after its last value.
    """

    entry: Entry
    group: int | None
    start: int
    stop: int


class AdapterStack:
    """The values of several adapters, at first all those of one adapter.

    Args:
        adapter: the one that is attached to the model.
        members: how many sets of values there are.

    Attributes:
        columns: one per entry of the adapter; those that train come first, group by group.
        values: [members, size].

    Raises:
        CannotBatch: the adapter has parameters that no linear layer or intervention holds, or not in float32.
    """

    def __init__(self, adapter: Adapter, members: int):
        self.adapter, self.members = adapter, members
        self.columns = _columns(adapter)
        self._column = {id(column.entry.parameter): index for index, column in enumerate(self.columns)}
        self._uses = _uses(adapter, self._column)
        flat = torch.cat([column.entry.parameter.detach().reshape(-1) for column in self.columns])
        self.values = flat.repeat(members, 1)
        self.rows = {
            path: torch.from_numpy(layer.rows).to(flat.device).repeat(members, 1)
            for path, layer in adapter.targets.items()
            if layer.rows is not None
        }
        self.used_rows: dict[str, Tensor] = {}
        self._views: list[Tensor] = []
        self._moving: Sequence[int] = ()
        self._seen: dict[int, npt.NDArray[np.bool_]] = {}

    def member(self, index: int) -> "StackedAdapter":
        """Return one member's values as an adapter: what a method loads and reads."""
        return StackedAdapter(self, index)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within, the model computes with the members that `use` names."""
        with ExitStack() as exits:
            for layer in self.adapter.targets.values():
                exits.enter_context(layer.unscattered())
            for use in self._uses:
                use.stack = self
                use.module.forward = use.forward  # hooks of the module stay
                exits.callback(delattr, use.module, "forward")
            try:
                yield
            finally:
                self._views = []
                self.adapter.context.client_batch = None

    def columns_of(self, groups: Sequence[TrainableGroup]) -> list[int]:
        """Return the columns of the groups' parameters, in their order."""
        return [self._column[id(parameter)] for group in groups for parameter in group.parameters]

    def gather(self, values: Tensor, columns: Sequence[int]) -> Tensor:
        """Return the values of some columns one after another, [members, their size]: a view, if they come first in
        `values`, [members, size]."""
        if list(columns) == list(range(len(columns))):
            return values[:, : sum(self._sizes(columns))]
        chosen = [self.columns[index] for index in columns]
        return torch.cat([values[:, column.start : column.stop] for column in chosen], dim=1)

    def write(self, slots: Sequence[int], columns: Sequence[int], moved: Tensor) -> None:
        """Set the values of some columns, gathered, of the members in these places."""
        places = torch.tensor(slots, device=moved.device)
        for index, piece in zip(columns, torch.split(moved, self._sizes(columns), dim=1), strict=True):
            self.values[places, self.columns[index].start : self.columns[index].stop] = piece

    def _sizes(self, columns: Sequence[int]) -> list[int]:
        return [self.columns[index].stop - self.columns[index].start for index in columns]

    def use(
        self, values: Tensor, slots: Sequence[int], columns: Sequence[int] = (), moving: Tensor | None = None
    ) -> None:
        """Choose the members of the following passes.

        Args:
            values: [members of the pass, size].
            slots: the members' places in the stack.
            columns: those that train.
            moving: their values, gathered: views of it receive gradients.
        """
        with torch.no_grad():
            self._views = [
                values[:, column.start : column.stop].view(len(values), *column.entry.parameter.shape)
                for column in self.columns
            ]
        self._moving = columns
        if moving is not None:
            for index, piece in zip(columns, torch.split(moving, self._sizes(columns), dim=1), strict=True):
                self._views[index] = piece.view_as(self._views[index]).detach().requires_grad_()
        self.used_rows = {path: rows[list(slots)] for path, rows in self.rows.items()}
        self._seen.clear()
        for use in self._uses:
            use.begin(training=moving is not None)

    def take_gradients(self) -> tuple[Tensor, npt.NDArray[np.bool_] | None]:
        """Return and drop the gradients.

        Returns:
            The gradients, [members of the pass, values that train], and which of these columns have one, [members,
            columns]; None: all. A parameter that took no part in a member's step has none, rather than a zero one.
        """
        members = len(self._views[0])
        present = np.ones((members, len(self._moving)), bool)
        gradients = []
        for place, index in enumerate(self._moving):
            leaf = self._views[index]
            if leaf.grad is None:
                present[:, place] = False
                gradients.append(leaf.new_zeros(members, leaf[0].numel()))
                continue
            gradients.append(leaf.grad.reshape(members, -1))
            leaf.grad = None
            if index in self._seen:
                present[:, place] = self._seen[index]
        self._seen.clear()
        return torch.cat(gradients, dim=1), None if present.all() else present

    def view(self, column: int) -> Tensor:
        """Return one entry's stack in the current pass, [members of the pass, *shape]."""
        return self._views[column]

    def see(self, column: int, counts: Sequence[int]) -> None:
        """Record on which members an entry acted: those that have tokens for it.

        Args:
            column: the entry's.
            counts: tokens per member.
        """
        acted = np.array(counts) > 0
        before = self._seen.get(column)
        self._seen[column] = acted if before is None else before | acted


class StackedAdapter(Adapter):
    """One member of a stack; its parameters are views of the stack's values."""

    def __init__(self, stack: AdapterStack, member: int):
        whole, self._member = stack.adapter, member
        self._own: dict[int, Entry] = {}
        for column in stack.columns:
            view = stack.values[member, column.start : column.stop].view(column.entry.parameter.shape).detach()
            view.requires_grad_(column.group is not None)
            self._own[id(column.entry.parameter)] = replace(column.entry, parameter=cast(nn.Parameter, view))
        groups = [
            Group(group.name, (self._own[id(entry.parameter)] for entry in group.entries), group.draw)
            for group in whole.groups
        ]
        targets = {
            path: StackedLayer(stack, member, path, layer, self._own[id(layer.own_b)].parameter)
            for path, layer in whole.targets.items()
        }
        super().__init__(whole.model, groups, whole.context, cast(Any, targets))
        self._whole = {name: whole.whole_layout(name) for name in whole.names}
        self.fit_capacity = whole.fit_capacity
        self.settle()

    def observed(self) -> dict[str, float]:
        return self._context.take_observed(self._member)


class StackedLayer:
    """The part of a `BranchedLinear` that an adapter uses, for one member: its rows of B."""

    def __init__(self, stack: AdapterStack, member: int, path: str, layer: "BranchedLinear", own_b: nn.Parameter):
        self._rows = stack.rows[path][member] if path in stack.rows else None
        self.d_out, self.num_rows, self.own_b = layer.d_out, layer.num_rows, own_b

    @property
    def rows(self) -> npt.NDArray[np.int64] | None:
        return None if self._rows is None else self._rows.cpu().numpy()

    def set_rows(self, rows: npt.NDArray[np.int64] | None) -> bool:
        """As `BranchedLinear.set_rows`.

        Raises:
            CannotBatch: another number of rows than the other members have.
        """
        if rows is None and self._rows is None:
            return False
        kept, index = keep_rows(self.own_b.detach(), self._rows, rows, self.d_out)
        if index is None or self._rows is None or len(index) != len(self._rows):
            raise CannotBatch("the method lets another number of rows exist for every client")
        self.own_b.data.copy_(kept)
        self._rows.copy_(index)
        return False


class _Linear:
    """A linear layer that computes with stacks.

    Args:
        module: the layer itself.
        weight: column of its weight.
        bias: column of its bias, if it has one.
        rows: path of the LoRA layer whose B this is, if only some of its rows exist.
        d_out: rows of the whole weight.
    """

    def __init__(self, module: nn.Linear, weight: int, bias: int | None, rows: str | None, d_out: int):
        self.module, self._weight, self._bias, self._rows, self._d_out = module, weight, bias, rows, d_out
        self.stack: AdapterStack
        self._training = False

    def begin(self, training: bool) -> None:
        self._training = training

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer for all members.

        Args:
            x: [members · rows, ..., d_in] or [members · rows · tokens, d_in]; for a layer that reads selected tokens
                [members · n, d_in], and its attribute `counts` says how many of the n are each member's own.

        Raises:
            CannotBatch: x has neither form, as in models that work on [tokens, examples, d].
        """
        weight, members = self.stack.view(self._weight), self.stack.adapter.context.client_batch
        counts = getattr(self.module, "counts", None)
        if counts is not None and self._training:
            self.stack.see(self._weight, counts)
        if counts is None and members is not None and members.rows:
            examples = members.count * members.rows
            if x.shape[0] != examples and (x.ndim > 2 or x.shape[0] != examples * members.tokens):
                raise CannotBatch(f"a layer of the model reads {tuple(x.shape)}, which is not one row per example")
        if self._rows is not None:
            # Scattering B costs less than scattering the outputs of all tokens.
            rows = self.stack.used_rows[self._rows][:, :, None].expand(weight.shape)
            weight = weight.new_zeros(len(weight), self._d_out, weight.shape[2]).scatter(1, rows, weight)
        bias = None if self._bias is None else self.stack.view(self._bias)
        return _linear(x.reshape(len(weight), -1, x.shape[-1]), weight, bias).reshape(*x.shape[:-1], -1)


class _Intervention:
    """One of pyreft's interventions: h + Pᵀ(W h + b − P h), or without − P h (DiReFT); P is R if it is a rotation.

    Args:
        module: pyreft's.
        columns: of P, W and b.
        rotation: the entry of R; None: P is free.
    """

    def __init__(self, module: nn.Module, columns: tuple[int, int, int], rotation: RotationEntry | None):
        self.module, self._columns, self._rotation = module, columns, rotation
        self._subtracts = type(module).__name__ in ("LoreftIntervention", "NoreftIntervention")
        self.stack: AdapterStack
        self._kept: Tensor | None = None
        self._training = False

    def begin(self, training: bool) -> None:
        self._kept, self._training = None, training

    def forward(self, hidden: Tensor, *, counts: Sequence[int]) -> Tensor:
        """Edit tokens: [members · n, d], of which the first `counts` of each member are its own."""
        projection, (source, bias) = self._projection(), (self.stack.view(column) for column in self._columns[1:])
        if self._training:
            for column in self._columns:
                self.stack.see(column, counts)
        x = hidden.reshape(len(source), -1, hidden.shape[-1])
        inner = _linear(x, source, bias)
        if self._subtracts:
            inner = inner - torch.bmm(x, projection)
        edited = (x + torch.bmm(inner, projection.mT)).reshape(hidden.shape)
        return cast(Tensor, cast(Any, self.module).dropout(edited, [(count,) for count in counts]))

    def _projection(self) -> Tensor:
        """[members, d, r]. A rotation is computed once for all passes without gradients."""
        raw = self.stack.view(self._columns[0])
        if self._rotation is None:
            return raw.mT
        if self._training:
            return self._rotation.rotation(raw)
        if self._kept is None:
            self._kept = self._rotation.rotation(raw)
        return self._kept


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x: [members, n, d_in]; weight: [members, d_out, d_in]; bias: [members, d_out]."""
    return torch.bmm(x, weight.mT) if bias is None else torch.baddbmm(bias[:, None], x, weight.mT)


def _columns(adapter: Adapter) -> tuple[Column, ...]:
    trainable = adapter.trainable_groups()
    group_of = {id(parameter): index for index, group in enumerate(trainable) for parameter in group.parameters}
    order = {id(parameter): place for place, parameter in enumerate(p for group in trainable for p in group.parameters)}
    entries = [entry for group in adapter.groups for entry in group.entries]
    columns, start = [], 0
    for entry in sorted(entries, key=lambda entry: order.get(id(entry.parameter), len(order))):
        size = entry.parameter.numel()
        columns.append(Column(entry, group_of.get(id(entry.parameter)), start, start + size))
        start += size
    return tuple(columns)


def _uses(adapter: Adapter, column: dict[int, int]) -> "list[_Linear | _Intervention]":
    """Return the modules that compute with the entries.

    Raises:
        CannotBatch: an entry belongs to neither a linear layer nor an intervention, or is not float32.
    """
    if (trained := adapter.base_group()) is not None:
        what = "the whole model trains" if trained == "full" else f"{trained!r} trains the base model's own parameters"
        raise CannotBatch(f"{what}, so clients have no base model in common")
    b_paths = {id(layer.own_b): path for path, layer in adapter.targets.items() if layer.rows is not None}
    found: list[_Linear | _Intervention] = []
    held: set[int] = set()
    rotations = {
        id(entry.parameter): entry
        for group in adapter.groups
        for entry in group.entries
        if isinstance(entry, RotationEntry)
    }
    for module in adapter.model.modules():
        if hasattr(module, "learned_source"):
            source: Any = module.learned_source
            rotated = hasattr(module, "rotate_layer")
            projection: Any = (
                cast(Any, module).rotate_layer.parametrizations.weight.original
                if rotated
                else cast(Any, module).proj_layer.weight
            )
            parameters = [projection, source.weight, source.bias]
            own = (column[id(projection)], column[id(source.weight)], column[id(source.bias)])
            found.append(_Intervention(module, own, rotations[id(projection)] if rotated else None))
            held |= {id(p) for p in parameters}
    for module in adapter.model.modules():
        if type(module) is nn.Linear and id(module.weight) in column and id(module.weight) not in held:
            parameters = [module.weight, *([] if module.bias is None else [module.bias])]
            if any(id(p) not in column for p in parameters):
                continue
            bias = None if module.bias is None else column[id(module.bias)]
            path = b_paths.get(id(module.weight))
            d_out = adapter.targets[path].d_out if path is not None else module.out_features
            found.append(_Linear(module, column[id(module.weight)], bias, path, d_out))
            held |= {id(p) for p in parameters}
    for group in adapter.groups:
        for entry in group.entries:
            if id(entry.parameter) not in held:
                raise CannotBatch(f"{group.name}.{entry.slot.name} is not part of a linear layer or an intervention")
            if entry.parameter.dtype != torch.float32:
                raise CannotBatch(f"{group.name}.{entry.slot.name} is {entry.parameter.dtype}, not float32")
    return found
