"""The largest batches, by hand and against the batches of the loop itself."""

from itertools import islice

import pyarrow as pa
import pytest

from fedray.config import TrainConfig
from fedray.data.shards import Shard
from fedray.evaluation.metrics.rouge_l import RougeL
from fedray.training.batch_shapes import BatchShape, LargestBatches, largest_batches
from fedray.training.loop import Train, steps, total_steps
from fedray.training.process_group import SINGLE_PROCESS
from fedray.types import IGNORED

LISTS = pa.list_(pa.int32())


def answers(*examples):
    """A table of examples of causal_lm, each (prompt tokens, answer tokens)."""
    ids = [[5] * (prompt + answer) for prompt, answer in examples]
    labels = [[IGNORED] * prompt + [5] * answer for prompt, answer in examples]
    return pa.table({"input_ids": pa.array(ids, LISTS), "labels": pa.array(labels, LISTS)})


def shard(client, table):
    return Shard(client, {"train": table, "validation": table.slice(0, 0), "test": table.slice(0, 0)})


def found(trained, evaluated=(), metrics=(), task="causal_lm", evaluated_together=4, **train):
    shards = [shard(f"client_{index}", table) for index, table in enumerate(trained)]
    section = TrainConfig(**{"batch_size": 2} | train)
    return largest_batches(shards, evaluated, task, section, 1, 0, metrics, evaluated_together)


def test_evaluation_is_batched_by_length():
    """By length 9, 8, 7, 7 | 3, 3, 3: the first batch has most tokens; the second one most units, 6, without padding.
    Relative to these, the first has 1 + 4/6 of both, and the second 1/4 + 1."""
    table = answers((8, 1), (7, 1), (6, 1), (6, 1), (1, 2), (1, 2), (1, 2))
    largest = found([], [table, answers((1, 1))])
    assert set(largest.evaluation) == {BatchShape(4, 9, 4, padded=True), BatchShape(3, 3, 6)}
    assert largest.scored == 10
    assert (largest.training, largest.prompts) == ((), None)


def test_a_batch_between_the_widest_and_that_of_most_units():
    """Two examples each: 100 tokens and 2 units, 98 and 90, 10 and 18: most units and most of both have the second."""
    table = answers((99, 1), (99, 1), (53, 45), (53, 45), (1, 9), (1, 9))
    assert set(found([], [table], evaluated_together=2).evaluation) == {BatchShape(2, 100, 2), BatchShape(2, 98, 90)}


def test_batches_have_no_more_examples_than_the_tables():
    table = answers((3, 2), (3, 2), (3, 2))
    largest = found([table], [table], evaluated_together=100, batch_size=64)
    assert largest.training == largest.evaluation == (BatchShape(3, 5, 6),)


def test_prompts_are_shorter_than_examples():
    """The longest prompt has 6 tokens, without its answer of 10."""
    largest = found([], [answers((6, 10), (4, 1)), answers((5, 1))], (RougeL(),))
    assert (largest.prompts.examples, largest.prompts.tokens, largest.prompts.padded) == (2, 6, True)


def test_classes_have_a_unit_per_example():
    table = pa.table({"input_ids": pa.array([[5] * 3, [5] * 7], LISTS), "labels": pa.array([0, 1], pa.int32())})
    largest = found([table], [table], task="classification")
    assert largest.training == largest.evaluation == (BatchShape(2, 7, 2, padded=True),)


def test_several_clients_are_padded_to_the_largest():
    assert BatchShape(3, 5, 6).times(2) == BatchShape(6, 5, 12, padded=True)
    assert BatchShape(3, 5, 6).times(1) == BatchShape(3, 5, 6)


def test_without_data_every_token_but_the_first_has_a_loss():
    full = LargestBatches.full("causal_lm", 2, 8, 16, (RougeL(),))
    assert full.training == (BatchShape(2, 16, 2 * 15, padded=True),)
    assert full.evaluation == (full.prompts,) == (BatchShape(8, 16, 8 * 15, padded=True),)
    assert LargestBatches.full("regression", 2, 8, 16, ()).evaluation == (BatchShape(8, 16, 8, padded=True),)


@pytest.mark.parametrize(
    "train",
    [
        {},
        {"epochs": 2.5, "accumulation": 3},
        {"max_steps": 2, "batch_size": 3},
        {"group_by_length": True, "batch_size": 4},
    ],
)
def test_the_widest_and_fullest_batches_of_training_are_those_of_the_loop(train, adapt, trainer, examples):
    """Of both rounds that a client can train in: the configured one, and the final pass."""
    tables = [examples("causal_lm", number, 50 + number) for number in (7, 13, 2)]
    section = {"batch_size": 2} | train
    context = trainer(adapt("causal_lm"), "causal_lm", seed=0, **section)._training_context
    seen = []
    for server_round in range(2):
        for index, table in enumerate(tables):
            request = Train(table, f"client_{index}", server_round)
            number = total_steps(table.num_rows, context.train)
            for step in islice(steps(request, context, SINGLE_PROCESS), number):
                for batch in step.micro_batches.values():
                    rows, tokens = batch["input_ids"].shape
                    units = int((batch["labels"][:, 1:] != IGNORED).sum())
                    seen.append(BatchShape(rows, tokens, units, not bool(batch["attention_mask"].all())))
    largest = found(tables, **section).training
    assert set(largest) <= set(seen)
    assert max(shape.examples * shape.tokens for shape in largest) == max(s.examples * s.tokens for s in seen)
    assert max(shape.units for shape in largest) == max(shape.units for shape in seen)
