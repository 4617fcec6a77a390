"""The batches of several clients as one forward pass (`fedray.training.batched`).

Every member has the rows and tokens of the largest batch; smaller ones are padded, and padding does not count.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from fedray.adapters.client_batch import ClientBatch
from fedray.adapters.stacked import AdapterStack
from fedray.data.batches import batches
from fedray.training.training_context import TrainingContext
from fedray.types import IGNORED, Task

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Joined:
    """Several members' batches as one.

    Attributes:
        batch: tensors of [members · rows, tokens] or [members · rows].
        shapes: each member's own (examples, tokens).
        rows: rows of every member in the pass.
        units: what the loss counts in every row: 1, or for causal_lm its answer tokens; [members · rows].
    """

    batch: Batch
    shapes: tuple[tuple[int, int], ...]
    rows: int
    units: npt.NDArray[np.int64]

    def on(self, device: Any) -> Batch:
        return {name: tensor.to(device) for name, tensor in self.batch.items()}

    def client_batch(self, slots: Sequence[int], device: Any, copies: int = 1) -> ClientBatch:
        """Return the members of an evaluation pass that reads each row `copies` times.

        Args:
            slots: the members' places in the stack.
        """
        shapes = tuple((copies * rows, tokens) for rows, tokens in self.shapes)
        return ClientBatch(tuple(slots), shapes, copies * self.rows, device)

    def weights(self, num_units: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return each unit's weight in its member's loss, 0 in padding rows, and its member, both [units].

        Args:
            num_units: units of each member's whole step.
        """
        row = np.repeat(np.arange(len(self.units)), self.units)
        member = row // self.rows
        own = row % self.rows < np.array([rows for rows, _ in self.shapes])[member]
        return torch.from_numpy((own / np.array(num_units)[member]).astype(np.float32)), torch.from_numpy(member)

    def own_units(self, device: Any) -> Iterator[Tensor]:
        """Yield the indices of each member's own units."""
        ends = np.concatenate([[0], np.cumsum(self.units)])
        for member, (rows, _) in enumerate(self.shapes):
            yield torch.arange(ends[member * self.rows], ends[member * self.rows + rows], device=device)


def join(parts: Sequence[Batch], task: Task, pad_token_id: int, left_pad: bool = False) -> Joined:
    """Join the members' batches into one. A member without rows of its own is padded with another member's examples.

    Padding rows have no answer tokens for causal_lm, and weight 0 otherwise.

    Args:
        left_pad: pad before the tokens instead of after them, as the batches are.
    """
    shapes = tuple((part["input_ids"].shape[0], part["input_ids"].shape[1]) for part in parts)
    rows, tokens = max(rows for rows, _ in shapes), max(tokens for _, tokens in shapes)
    fills = {"input_ids": pad_token_id, "labels": IGNORED}
    batch = {}

    def place(width: int) -> slice:
        return slice(tokens - width, None) if left_pad else slice(width)

    some = next(part for part, (own, _) in zip(parts, shapes, strict=True) if own)
    for name, like in some.items():
        joined = like.new_full((len(parts), rows, *([tokens] if like.ndim == 2 else [])), fills.get(name, 0))
        for member, part, (own, width) in zip(joined, parts, shapes, strict=True):
            if own < rows and not (task == "causal_lm" and name == "labels"):
                source = part[name] if own else some[name]
                member[own:][..., place(source.shape[1]) if source.ndim == 2 else slice(None)] = source[0]
            if own:
                member[:own][..., place(width) if like.ndim == 2 else slice(None)] = part[name]
        batch[name] = joined.flatten(0, 1)
    if task == "causal_lm" and "labels" in batch:
        units = (batch["labels"][:, 1:] != IGNORED).sum(1).numpy()
    else:
        units = np.ones(len(parts) * rows, np.int64)
    return Joined(batch, shapes, rows, units)


def passes(
    stack: AdapterStack,
    tables: Mapping[int, pa.Table],
    batch_size: int,
    order: Callable[[pa.Table], npt.NDArray[np.int64] | None],
    training_context: TrainingContext,
    left_pad: bool = False,
    copies: int = 1,
) -> "Iterator[tuple[list[int], Joined]]":
    """Prepare the stack for one evaluation pass after another, until all members have read their tables.

    Args:
        left_pad: pad before the tokens instead of after them, for generation.
        copies: how often the model reads each row of a pass, one copy after another, as beam search does.

    Yields:
        The places of the members of the pass, and their joined batches.
    """
    numbers = {slot: math.ceil(table.num_rows / batch_size) for slot, table in tables.items()}
    slots = sorted(numbers, key=lambda slot: -numbers[slot])  # members with most steps first: a prefix goes on
    pad_token_id = training_context.pad_token_id
    cut = [batches(tables[slot], batch_size, pad_token_id, order(tables[slot]), left_pad=left_pad) for slot in slots]
    values = stack.values[slots]
    members = 0
    for index in range(max(numbers.values(), default=0)):
        if members != (alive := sum(number > index for number in numbers.values())):
            members = alive
            stack.use(values[:members], slots[:members])
        joined = join([next(one) for one in cut[:members]], training_context.task, pad_token_id, left_pad)
        stack.adapter.context.client_batch = joined.client_batch(slots[:members], training_context.device, copies)
        yield slots[:members], joined
