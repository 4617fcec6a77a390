"""The largest batches of a tier's clients, as shapes: what a step, an evaluation or a generation holds follows from
them.

Batches are those that the loop and the evaluation make of the same tables: training examples in the loop's own order,
evaluated ones by length.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fedray.config import Metric, TrainConfig
from fedray.data.batches import by_length, lengths
from fedray.data.shards import Shard
from fedray.evaluation.generation import prompts_alone
from fedray.evaluation.losses import num_units
from fedray.evaluation.metrics import generates_text
from fedray.evaluation.options import has_options, options_of
from fedray.training.loop import epoch_order, total_steps
from fedray.types import Task

DRAWN = 2000
"""Batches of training that are drawn to find the largest ones; at least one round of the client with the longest
example."""

Sizes = npt.NDArray[np.int64]
"""Examples, tokens, units, and whether there is padding, of every batch; [batches, 4]."""


@dataclass(frozen=True)
class BatchShape:
    """One batch.

    Attributes:
        examples: its rows.
        tokens: of every row, padding included.
        units: what has a loss: answer tokens for causal_lm, examples otherwise.
        padded: whether some example is shorter, so that attention needs a mask.
    """

    examples: int
    tokens: int
    units: int
    padded: bool = False

    @classmethod
    def full(cls, task: Task, examples: int, tokens: int) -> "BatchShape":
        """Return the batch with a loss wherever there can be one, though nothing predicts a text's first token, and
        with padding."""
        return cls(examples, tokens, examples * (tokens - 1) if task == "causal_lm" else examples, padded=tokens > 1)

    def times(self, clients: int) -> "BatchShape":
        """Return the batches of several clients as one; they are padded to the largest."""
        padded = self.padded or clients > 1
        return replace(self, examples=clients * self.examples, units=clients * self.units, padded=padded)


@dataclass(frozen=True)
class LargestBatches:
    """The largest batches of a tier; nothing where the tier has no such examples.

    Attributes:
        training: of a step. One of them takes the most memory; which one depends on the model.
        evaluation: of an evaluation, options that are ranked included; likewise.
        prompts: of the generation of texts; their units do not count.
        scored: units of the largest evaluated table.
    """

    training: tuple[BatchShape, ...]
    evaluation: tuple[BatchShape, ...]
    prompts: BatchShape | None
    scored: int

    @classmethod
    def full(
        cls, task: Task, training: int, evaluation: int, tokens: int, metrics: Sequence[Metric]
    ) -> "LargestBatches":
        """Return full batches of examples of `tokens` tokens, with a loss wherever there can be one.

        Args:
            training, evaluation: examples of a batch.
            metrics: decide whether texts are generated.
        """
        evaluated = BatchShape.full(task, evaluation, tokens)
        prompts = evaluated if generates_text(metrics) else None
        return cls((BatchShape.full(task, training, tokens),), (evaluated,), prompts, evaluated.units)


def largest_batches(
    shards: Sequence[Shard],
    evaluated: Sequence[pa.Table],
    task: Task,
    train: TrainConfig,
    rounds: int,
    seed: int,
    metrics: Sequence[Metric],
    batch_size: int,
) -> LargestBatches:
    """Return the largest batches that clients train on and evaluate.

    Args:
        shards: of the tier's clients.
        evaluated: every table that they evaluate.
        rounds: of the experiment; every client may train in each of them, and once more in the final pass.
        metrics: decide whether texts are generated and options ranked.
        batch_size: of evaluations.
    """
    tables = [table for table in evaluated if table.num_rows]
    scored = [*tables, *(options_of(table) for table in tables if has_options(table, metrics))]
    sizes = [batch_sizes(table, by_length(table), batch_size, task) for table in scored]
    prompts = [prompts_alone(table) for table in tables] if generates_text(metrics) else []
    read = [
        _shape(found)
        for table in prompts
        for found in batch_sizes(table, by_length(table)[:batch_size], batch_size, "classification").tolist()
    ]
    return LargestBatches(
        _largest(_drawn(shards, task, train, rounds, seed)),
        _largest(sizes),
        max(read, key=lambda shape: shape.examples * shape.tokens, default=None),
        max((int(found[:, 2].sum()) for found in sizes), default=0),
    )


def batch_sizes(table: pa.Table, order: npt.NDArray[np.integer], batch_size: int, task: Task) -> Sizes:
    """Return the sizes of the batches into which `order`, at least one row, is cut."""
    starts = np.arange(0, len(order), batch_size)
    examples, own = np.diff(starts, append=len(order)), lengths(table)[order]
    tokens, filled = np.maximum.reduceat(own, starts), np.add.reduceat(own, starts)
    units = np.add.reduceat(num_units(table, task)[order], starts)
    return np.stack([examples, tokens, units, filled < examples * tokens], axis=1)


def _drawn(shards: Sequence[Shard], task: Task, train: TrainConfig, rounds: int, seed: int) -> Iterator[Sizes]:
    """Yield the sizes of micro-batches, by round and client, beginning with the longest examples: about `DRAWN`."""
    trained = [shard for shard in shards if shard.num_examples()]
    trained.sort(key=lambda shard: -lengths(shard.tables["train"]).max())
    left = DRAWN
    for server_round in range(rounds + 1):
        for shard in trained:
            table, size = shard.tables["train"], train.batch_size * train.accumulation
            steps, per_epoch = total_steps(table.num_rows, train), math.ceil(table.num_rows / size)
            for epoch in range(math.ceil(steps / per_epoch)):
                order = epoch_order(table, train, seed, server_round, shard.client, epoch)
                yield (found := batch_sizes(table, order[: (steps - epoch * per_epoch) * size], train.batch_size, task))
                left -= len(found)
            if left <= 0:
                return


def _largest(sizes: Iterable[Sizes]) -> tuple[BatchShape, ...]:
    """Return the batch of most tokens, that of most units, and that of most of both; each once."""
    found = [*sizes]
    if not found:
        return ()
    every = np.unique(np.concatenate(found), axis=0)
    tokens, units = every[:, 0] * every[:, 1], every[:, 2]
    both = tokens / max(tokens.max(), 1) + units / max(units.max(), 1)
    keys = ((every[:, 3], units, tokens), (every[:, 3], tokens, units), (every[:, 3], tokens, both))
    return tuple(dict.fromkeys(_shape(every[np.lexsort(key)[-1]].tolist()) for key in keys))


def _shape(sizes: Sequence[int]) -> BatchShape:
    examples, tokens, units, padded = sizes
    return BatchShape(examples, tokens, units, bool(padded))
