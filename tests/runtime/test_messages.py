"""What travels between the pool and its actors, without a cluster."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedray.federation.result_batches import BATCH_SECONDS, ResultBatch
from fedray.federation.worker import ClientTask
from fedray.runtime.messages import ObjectSlot, Turn, from_message, task_batch, to_message
from fedray.runtime.pool import ClientPool, _Pace
from fedray.types import Client


def test_a_sealed_value_comes_back_and_its_arrays_are_not_copied() -> None:
    value = {"a": [np.arange(5.0)], "b": ("text", 3)}
    found = from_message(to_message(value))
    assert np.shares_memory(found["a"][0], value["a"][0])
    assert found["a"][0].tolist() == [0, 1, 2, 3, 4]
    assert found["b"] == value["b"]


def test_a_chunk_names_every_reference_once() -> None:
    down, shards = object(), [object(), object()]
    turns = [
        Turn(
            ClientTask(Client(f"c{k}", k, 1), 0, False),
            ObjectSlot(down, "all"),
            None,
            ObjectSlot(shards[k % 2], f"c{k}"),
        )
        for k in range(3)
    ]
    chunk = task_batch([turns[:2], turns[2:]], 7.0)
    assert chunk.refs == [down, *shards]
    task_groups = from_message(chunk.task_groups)
    assert [[turn.assignment.client.id for turn in group] for group in task_groups] == [["c0", "c1"], ["c2"]]
    assert [turn.shard for group in task_groups for turn in group] == [(1, "c0"), (2, "c1"), (1, "c2")]
    assert {turn.downlink for group in task_groups for turn in group} == {(0, "all")}
    assert chunk.block_seconds == 7.0


def test_a_pace_is_of_all_blocks() -> None:
    """3 + 1 examples and one more for each client in 2 s, then 5 + 1 in 1 s: 12 in 3 s."""
    pace = _Pace()
    assert pace.work_in(10) == 0
    for seconds, examples in ((2.0, (3, 1)), (1.0, (5,))):
        outcomes: Any = [SimpleNamespace(update=SimpleNamespace(client=Client("c", 0, n))) for n in examples]
        pace.add(ResultBatch(outcomes, (), (), None, (), 1, seconds, False))
    assert pace.work_in(10) == pytest.approx(40)


@pytest.mark.parametrize(
    ("handling", "actors", "expected"),
    [
        (0.0005, 2, BATCH_SECONDS),  # 1 ms in 100
        (0.005, 2, 0.5),  # 10 ms in 500, a fiftieth
        (0.005, 10, 1.0),  # 50 ms in 1,000: nobody is to lose more than a second by a death
        (0.01, 1000, 10.0),  # what cannot be taken is not sent
    ],
)
def test_handling_takes_a_small_part_of_the_time(handling: float, actors: int, expected: float) -> None:
    members = {"a": [None] * (actors - actors // 2), "b": [None] * (actors // 2)}
    pool: Any = SimpleNamespace(_handling=handling, crew=SimpleNamespace(members=members))
    assert ClientPool._block_seconds(pool) == pytest.approx(expected)
