"""What travels between the pool and its actors, without a cluster."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from examples import EXAMPLES

from fedray.config import load_config
from fedray.errors import ConfigError
from fedray.federation.tasks import ClientTask, Downlink
from fedray.runtime.messages import ObjectSlot, from_message, put_downlinks, resolve_tasks, task_batch, to_message
from fedray.types import Client


def test_a_message_comes_back_and_its_arrays_are_not_copied() -> None:
    value = {"a": [np.arange(5.0)], "b": ("text", 3)}
    found = from_message(to_message(value))
    assert np.shares_memory(found["a"][0], value["a"][0])
    assert found["a"][0].tolist() == [0, 1, 2, 3, 4]
    assert found["b"] == value["b"]


def test_a_class_that_this_process_cannot_import_is_named(own_folder: Path, smallest: dict[str, Any]) -> None:
    """As on a node that does not have the user's file."""
    (own_folder / "my_metric.py").write_text(EXAMPLES["my_metric.py"])
    sent = to_message(load_config(smallest, {"evaluation.metric": {"class": "my_metric.ErrorRate"}}))
    (own_folder / "my_metric.py").unlink()
    del sys.modules["my_metric"]
    with pytest.raises(ConfigError, match=r"^node .*'my_metric.ErrorRate' cannot be imported.*all nodes can import$"):
        from_message(sent)


def test_a_small_payload_travels_with_the_tasks_once_and_as_it_is() -> None:
    shards = object()
    downlink = Downlink(3, np.arange(5.0), 40)
    tasks = [ClientTask(Client(f"c{k}", k, 1), 0, downlink, False) for k in range(2)]
    slots = {f"c{k}": ObjectSlot(shards, f"c{k}") for k in range(2)}
    assert put_downlinks(tasks) == {3: downlink}, "without a cluster: nothing is put anywhere"
    (groups,) = resolve_tasks(task_batch([tasks], {3: downlink}, slots), {shards: {"c0": "shard 0", "c1": "shard 1"}})
    assert [task.shard for task in groups] == ["shard 0", "shard 1"]
    assert groups[0].downlink is groups[1].downlink
    assert groups[0].downlink.payload.tolist() == [0, 1, 2, 3, 4]


def test_a_task_batch_names_every_reference_once() -> None:
    down, shards = object(), [object(), object()]
    tasks = [ClientTask(Client(f"c{k}", k, 1), 0, Downlink(0, np.zeros(2), 8), False) for k in range(3)]
    slots = {f"c{k}": ObjectSlot(shards[k % 2], f"c{k}") for k in range(3)}
    batch = task_batch([tasks[:2], tasks[2:]], {0: Downlink(0, ObjectSlot(down, "all"), 8)}, slots, 7.0)
    assert batch.refs == [down, *shards]
    groups = from_message(batch.groups)
    assert [[task.client.id for task in group] for group in groups] == [["c0", "c1"], ["c2"]]
    assert [task.shard for group in groups for task in group] == [(1, "c0"), (2, "c1"), (1, "c2")]
    assert {task.downlink.payload for group in groups for task in group} == {(0, "all")}
    assert len({id(task.downlink) for group in groups for task in group}) == 1, "what is shared travels once"
    assert batch.batch_seconds == 7.0
