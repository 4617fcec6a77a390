"""Batches of results of clients that finished together, with training that the test plays."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedray.aggregation.pairwise import PairwiseMean
from fedray.config import load_config
from fedray.config.clients import UpdateChecks
from fedray.errors import TrainingError
from fedray.federation.failures import TaskFailure
from fedray.federation.result_batches import ResultBatch, ResultBatcher, state_files
from fedray.federation.tasks import ClientResult, ClientTask, Downlink, Keep, WorkerSetup
from fedray.methods.bases.shared_adapter import ClientState, GlobalAdapter
from fedray.storage.paths import StoragePath
from fedray.training.trainer import ClientReport
from fedray.types import Client

CONFIG = {
    "rounds": 1,
    "method": ["fedavg", "fedalt"],
    "model": {"path": "random", "tokenizer": "bytes", "config": {"model_type": "bert"}},
    "data": {"source": "synthetic"},
}
SENT = np.array([[1, 10], [2, 20], [3, 30], [4, 40], [8, 80]], np.float32)


@dataclass
class Plays:
    """Client k of n examples k + 1 sends SENT[k] and keeps a head of its own; `seen` are the states that came in."""

    sent: Any = None
    seen: tuple[Any, ...] = ()

    def __call__(self, group: Sequence[ClientTask]) -> Iterator[ClientResult]:
        for task in group:
            client = task.client
            self.seen += (task.state,)
            payload = GlobalAdapter(SENT[client.index], None) if self.sent is None else self.sent
            report = ClientReport(1, 0.0, 0.0, {}, {})
            state = ClientState(np.full(3, client.index, np.float32))
            adapter: Any = {"B": np.full(2, client.index)} if task.keep == "adapter" else None
            yield ClientResult(client, task.server_round, client.num_examples, payload, 8, 8, report, state, adapter)


def setup(folder: Path | None, method: int = 0) -> WorkerSetup:
    config = load_config(CONFIG)
    entry = config.method[method]
    if folder is not None:
        (folder / "states" / entry.key).mkdir(parents=True)
    place = None if folder is None else StoragePath.of(folder)
    return WorkerSetup(config, entry, None, (), 0, folder=place)  # type: ignore[arg-type]


def tasks(*groups: Sequence[int], keep: Keep = "state", states: Any = None) -> list[list[ClientTask]]:
    sent = Downlink(0, None, 0)
    return [
        [ClientTask(Client(f"c{k}", k, k + 1), 3, sent, False, keep, k, states[k] if states else None) for k in group]
        for group in groups
    ]


def ids(batch: ResultBatch) -> list[str]:
    return [result.client.id for result in batch.results]


def states_of(batch: ResultBatch) -> tuple[Any, ...]:
    return tuple(result.state for result in batch.results)


@pytest.mark.parametrize(("seconds", "expected"), [(60, [["c0", "c1", "c2"]]), (0, [["c0", "c1"], ["c2"]])])
def test_a_batch_ends_after_its_time_with_a_whole_group(
    tmp_path: Path, seconds: float, expected: list[list[str]]
) -> None:
    batches = list(ResultBatcher(setup(tmp_path), Plays()).serve(tasks([0, 1], [2]), seconds))
    assert [ids(batch) for batch in batches] == expected
    assert [batch.last for batch in batches] == [False] * (len(expected) - 1) + [True]


def test_large_updates_that_travel_one_by_one_end_a_batch(tmp_path: Path) -> None:
    class Heavy(Plays):
        def __call__(self, group: Sequence[ClientTask]) -> Iterator[ClientResult]:
            for result in super().__call__(group):
                yield result._replace(uplink_bytes=60_000)

    averaged = list(ResultBatcher(setup(None), Heavy()).serve(tasks([0], [1], [2], [3]), 60))
    each = list(ResultBatcher(setup(None, method=1), Heavy()).serve(tasks([0], [1], [2], [3]), 60))
    assert [ids(batch) for batch in averaged] == [["c0", "c1", "c2", "c3"]]
    assert [ids(batch) for batch in each] == [["c0", "c1"], ["c2", "c3"]]


def test_large_states_end_a_batch_too(tmp_path: Path) -> None:
    class Heavy(Plays):
        def __call__(self, group: Sequence[ClientTask]) -> Iterator[ClientResult]:
            for result in super().__call__(group):
                yield result._replace(state=ClientState(np.zeros(30_000, np.float32)))

    batches = list(ResultBatcher(setup(tmp_path), Heavy()).serve(tasks([0], [1], [2]), 60))
    assert [ids(batch) for batch in batches] == [["c0"], ["c1"], ["c2"]]
    assert len(list((tmp_path / "states" / "fedavg").iterdir())) == 3


def test_what_is_averaged_returns_as_a_mean_however_it_was_cut(tmp_path: Path) -> None:
    """Weights 1 to 5: (1·1 + 2·2 + 3·3 + 4·4 + 5·8)/15 = 70/15."""
    bits = set()
    for number, groups in enumerate(([[0, 1, 2, 3, 4]], [[4], [2, 3], [0], [1]], [[0], [1], [2], [3], [4]])):
        mean = PairwiseMean()
        for batch in ResultBatcher(setup(tmp_path / str(number)), Plays()).serve(tasks(*groups), 0):
            assert all(result.payload is None for result in batch.results)
            assert batch.structure.head is None
            for node in batch.means:
                mean.add(node)
        total = mean.total()
        assert total is not None
        assert (total.weight, total.leaves) == (15, 5)
        np.testing.assert_allclose(total.arrays[0], [70 / 15, 700 / 15], rtol=1e-6)
        bits.add(total.arrays[0].tobytes())
    assert len(bits) == 1


def test_a_method_that_needs_every_update_gets_it() -> None:
    (batch,) = ResultBatcher(setup(None, method=1), Plays()).serve(tasks([0, 1]), 60)
    assert batch.means == ()
    assert [result.payload.adapter.tolist() for result in batch.results] == SENT[:2].tolist()


def test_states_go_to_the_folder_and_come_back(tmp_path: Path) -> None:
    the_setup = setup(tmp_path)
    (batch,) = ResultBatcher(the_setup, Plays()).serve(tasks([0, 1]), 60)
    plays = Plays()
    list(ResultBatcher(the_setup, plays).serve(tasks([1, 0], states=states_of(batch)), 60))
    assert [state.head.tolist() for state in plays.seen] == [[1] * 3, [0] * 3]
    files = state_files(the_setup)
    assert files is not None
    assert [state.head[0] for state in files.read(states_of(batch))] == [0, 1]


def test_final_adapters_are_written_and_nothing_else(tmp_path: Path) -> None:
    (batch,) = ResultBatcher(setup(tmp_path), Plays()).serve(tasks([0, 1], keep="adapter"), 60)
    assert (states_of(batch), batch.means) == ((None, None), ())
    assert all(result.adapter is None and result.payload is None for result in batch.results)
    found = {path.name: load_file(path)["B"].tolist() for path in (tmp_path / "adapters").rglob("*") if path.is_file()}
    assert found == {"c0.safetensors": [0, 0], "c1.safetensors": [1, 1]}
    assert list((tmp_path / "states" / "fedavg").iterdir()) == []


def test_a_trial_leaves_nothing() -> None:
    (batch,) = ResultBatcher(setup(None), Plays()).serve(tasks([0, 1], keep="nothing"), 60)
    assert (ids(batch), states_of(batch), batch.means) == (["c0", "c1"], (None, None), ())


@pytest.mark.parametrize(
    ("payload", "error", "message"),
    [
        (GlobalAdapter(np.array([1, 2], np.int64), None), TypeError, "arrays of floats, not ndarray"),
        (replace(GlobalAdapter(SENT[0], None), head=3.5), TypeError, "head: .*arrays of floats, not float"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_averaged_is_said(tmp_path: Path, payload: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        list(ResultBatcher(setup(tmp_path), Plays(sent=payload)).serve(tasks([1]), 60))


def test_one_clients_useless_update_is_kept_out_of_the_others_mean(tmp_path: Path) -> None:
    class Poisoned(Plays):
        def __call__(self, group: Sequence[ClientTask]) -> Iterator[ClientResult]:
            for result in super().__call__(group):
                bad = result.client.id == "c1"
                payload = GlobalAdapter(np.array([1, np.nan], np.float32), None) if bad else result.payload
                yield result._replace(payload=payload)

    the_setup = setup(tmp_path)
    (batch,) = ResultBatcher(the_setup, Poisoned()).serve(tasks([0, 1], [2]), 60)
    assert ids(batch) == ["c0", "c2"]
    assert batch.failures == (TaskFailure(("c1",), "not finite: adapter", rejected=True),)
    assert batch.groups == 2
    assert sum(node.leaves for node in batch.means) == 2
    assert None not in states_of(batch)
    (trial,) = ResultBatcher(the_setup, Poisoned()).serve(tasks([1], keep="nothing"), 60)
    assert trial.failures == (), "a trial sends nothing"


def test_an_exception_costs_its_group_and_no_other(tmp_path: Path) -> None:
    class Raising(Plays):
        def __call__(self, group: Sequence[ClientTask]) -> Iterator[ClientResult]:
            if group[0].client.id == "c1":
                raise KeyError("a hole")
            if group[0].client.id == "c3":
                raise TrainingError("diverged")
            yield from super().__call__(group)

    (batch,) = ResultBatcher(setup(tmp_path / "a"), Raising()).serve(tasks([0], [1, 2], [3], [4]), 60)
    assert ids(batch) == ["c0", "c4"]
    hole, diverged = batch.failures
    assert (hole.clients, hole.cause, hole.non_retryable) == (("c1", "c2"), "KeyError: 'a hole'", False)
    assert "in __call__" in hole.trace
    assert (diverged.clients, diverged.cause, diverged.non_retryable, diverged.trace) == (("c3",), "diverged", True, "")
    with pytest.raises(KeyError):
        list(ResultBatcher(setup(tmp_path / "b"), Raising(), survives=False).serve(tasks([1]), 60))


def test_with_a_bound_on_norms_updates_travel_one_by_one(tmp_path: Path) -> None:
    the_setup = setup(tmp_path)
    clients = the_setup.config.clients.model_copy(update={"update_checks": UpdateChecks(norm=10)})
    config = the_setup.config.model_copy(update={"clients": clients})
    (batch,) = ResultBatcher(replace(the_setup, config=config), Plays()).serve(tasks([0, 1]), 60)
    assert batch.means == ()
    assert [result.payload.adapter.tolist() for result in batch.results] == SENT[:2].tolist()
