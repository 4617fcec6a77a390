"""ResultBatcher of clients that finished together, with a training that the test plays."""

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
from fedray.federation.result_batches import Given, ResultBatch, ResultBatcher, state_files
from fedray.federation.worker import ClientTask, Keep, Outcome, WorkerSetup
from fedray.methods.fedavg import ClientState, GlobalAdapter
from fedray.methods.protocol import Update
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

    def __call__(self, group: Sequence[ClientTask], downlinks: Any, states: Any, shards: Any) -> Iterator[Any]:
        for assignment, state in zip(group, states, strict=True):
            client = assignment.client
            self.seen += (state,)
            payload = GlobalAdapter(SENT[client.index], None) if self.sent is None else self.sent
            report = ClientReport(client.id, 0, client.num_examples, 1, 0.0, 0.0, None, None, {})
            tensors = {"B": np.full(2, client.index)} if assignment.keep == "adapter" else None
            outcome = Outcome(Update(client, client.num_examples, payload), report, 8, 8, tensors)
            yield outcome, ClientState(np.full(3, client.index, np.float32))


def job(folder: Path | None, method: int = 0) -> WorkerSetup:
    config = load_config(CONFIG)
    entry = config.method[method]
    if folder is not None:
        (folder / "states" / entry.key).mkdir(parents=True)
    place = None if folder is None else StoragePath.of(folder)
    return WorkerSetup(config, entry, None, (), 0, folder=place)  # type: ignore[arg-type]


def given(*groups: Sequence[int], keep: Keep = "state", states: Any = None) -> list[Given]:
    return [
        (
            [ClientTask(Client(f"c{k}", k, k + 1), 3, False, keep, position=k) for k in group],
            [None] * len(group),
            [states[k] if states else None for k in group],
            [None] * len(group),  # type: ignore[list-item]
        )
        for group in groups
    ]


def ids(block: ResultBatch) -> list[str]:
    return [outcome.update.client.id for outcome in block.outcomes]


@pytest.mark.parametrize(("lasting", "expected"), [(60, [["c0", "c1", "c2"]]), (0, [["c0", "c1"], ["c2"]])])
def test_a_block_ends_with_its_time_after_a_whole_group(
    tmp_path: Path, lasting: float, expected: list[list[str]]
) -> None:
    blocks = list(ResultBatcher(job(tmp_path), Plays()).serve(given([0, 1], [2]), lasting))
    assert [ids(block) for block in blocks] == expected
    assert [block.last for block in blocks] == [False] * (len(expected) - 1) + [True]


def test_large_updates_that_travel_one_by_one_end_a_block(tmp_path: Path) -> None:
    class Heavy(Plays):
        def __call__(self, *given: Any) -> Iterator[Any]:
            for outcome, state in super().__call__(*given):
                yield replace(outcome, uplink_bytes=60_000), state

    averaged = list(ResultBatcher(job(None), Heavy()).serve(given([0], [1], [2], [3]), 60))
    each = list(ResultBatcher(job(None, method=1), Heavy()).serve(given([0], [1], [2], [3]), 60))
    assert [ids(block) for block in averaged] == [["c0", "c1", "c2", "c3"]]
    assert [ids(block) for block in each] == [["c0", "c1"], ["c2", "c3"]]


def test_large_states_end_a_block_too(tmp_path: Path) -> None:
    class Heavy(Plays):
        def __call__(self, *given: Any) -> Iterator[Any]:
            for outcome, _ in super().__call__(*given):
                yield outcome, ClientState(np.zeros(30_000, np.float32))

    blocks = list(ResultBatcher(job(tmp_path), Heavy()).serve(given([0], [1], [2]), 60))
    assert [ids(block) for block in blocks] == [["c0"], ["c1"], ["c2"]]
    assert len(list((tmp_path / "states" / "fedavg").iterdir())) == 3


def test_what_is_averaged_returns_as_a_mean_however_it_was_cut(tmp_path: Path) -> None:
    """Weights 1 to 5: (1·1 + 2·2 + 3·3 + 4·4 + 5·8)/15 = 70/15."""
    bits = set()
    for number, groups in enumerate(([[0, 1, 2, 3, 4]], [[4], [2, 3], [0], [1]], [[0], [1], [2], [3], [4]])):
        mean = PairwiseMean()
        for block in ResultBatcher(job(tmp_path / str(number)), Plays()).serve(given(*groups), 0):
            assert all(outcome.update.payload is None for outcome in block.outcomes)
            assert block.shape.head is None
            for node in block.means:
                mean.add(node)
        total = mean.total()
        assert total is not None
        assert (total.weight, total.leaves) == (15, 5)
        np.testing.assert_allclose(total.arrays[0], [70 / 15, 700 / 15], rtol=1e-6)
        bits.add(total.arrays[0].tobytes())
    assert len(bits) == 1


def test_a_method_that_needs_every_update_gets_it() -> None:
    (block,) = ResultBatcher(job(None, method=1), Plays()).serve(given([0, 1]), 60)
    assert block.means == ()
    assert [outcome.update.payload.adapter.tolist() for outcome in block.outcomes] == SENT[:2].tolist()


def test_states_go_to_the_folder_and_come_back(tmp_path: Path) -> None:
    the_job = job(tmp_path)
    (block,) = ResultBatcher(the_job, Plays()).serve(given([0, 1]), 60)
    plays = Plays()
    list(ResultBatcher(the_job, plays).serve(given([1, 0], states=block.states), 60))
    assert [state.head.tolist() for state in plays.seen] == [[1] * 3, [0] * 3]
    files = state_files(the_job)
    assert files is not None
    assert [state.head[0] for state in files.read(block.states)] == [0, 1]


def test_what_is_taken_home_is_written_and_nothing_else(tmp_path: Path) -> None:
    (block,) = ResultBatcher(job(tmp_path), Plays()).serve(given([0, 1], keep="adapter"), 60)
    assert (block.states, block.means) == ((None, None), ())
    assert all(outcome.tensors is None and outcome.update.payload is None for outcome in block.outcomes)
    found = {path.name: load_file(path)["B"].tolist() for path in (tmp_path / "adapters").rglob("*") if path.is_file()}
    assert found == {"c0.safetensors": [0, 0], "c1.safetensors": [1, 1]}
    assert list((tmp_path / "states" / "fedavg").iterdir()) == []


def test_a_trial_leaves_nothing() -> None:
    (block,) = ResultBatcher(job(None), Plays()).serve(given([0, 1], keep="nothing"), 60)
    assert (ids(block), block.states, block.means) == (["c0", "c1"], (None, None), ())


@pytest.mark.parametrize(
    ("payload", "error", "message"),
    [
        (GlobalAdapter(np.array([1, 2], np.int64), None), TypeError, "arrays of floats, not ndarray"),
        (replace(GlobalAdapter(SENT[0], None), head=3.5), TypeError, "head: .*arrays of floats, not float"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_averaged_is_said(tmp_path: Path, payload: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        list(ResultBatcher(job(tmp_path), Plays(sent=payload)).serve(given([1]), 60))


def test_one_clients_useless_update_is_kept_out_of_the_others_mean(tmp_path: Path) -> None:
    class Poisoned(Plays):
        def __call__(self, *given: Any) -> Iterator[Any]:
            for outcome, state in super().__call__(*given):
                bad = outcome.update.client.id == "c1"
                payload = GlobalAdapter(np.array([1, np.nan], np.float32), None) if bad else outcome.update.payload
                yield replace(outcome, update=replace(outcome.update, payload=payload)), state

    the_job = job(tmp_path)
    (block,) = ResultBatcher(the_job, Poisoned()).serve(given([0, 1], [2]), 60)
    assert ids(block) == ["c0", "c2"]
    assert block.failures == (TaskFailure(("c1",), "not finite: adapter", rejected=True),)
    assert block.groups == 2
    assert sum(node.leaves for node in block.means) == 2
    assert len(block.states) == 2
    (trial,) = ResultBatcher(the_job, Poisoned()).serve(given([1], keep="nothing"), 60)
    assert trial.failures == (), "a trial sends nothing"


def test_an_exception_costs_its_group_and_no_other(tmp_path: Path) -> None:
    class Raising(Plays):
        def __call__(self, group: Any, *rest: Any) -> Iterator[Any]:
            if group[0].client.id == "c1":
                raise KeyError("a hole")
            if group[0].client.id == "c3":
                raise TrainingError("diverged")
            yield from super().__call__(group, *rest)

    (block,) = ResultBatcher(job(tmp_path / "a"), Raising()).serve(given([0], [1, 2], [3], [4]), 60)
    assert ids(block) == ["c0", "c4"]
    hole, diverged = block.failures
    assert (hole.clients, hole.cause, hole.non_retryable) == (("c1", "c2"), "KeyError: 'a hole'", False)
    assert "in __call__" in hole.trace
    assert (diverged.clients, diverged.cause, diverged.non_retryable, diverged.trace) == (("c3",), "diverged", True, "")
    with pytest.raises(KeyError):
        list(ResultBatcher(job(tmp_path / "b"), Raising(), survives=False).serve(given([1]), 60))


def test_with_a_bound_on_norms_updates_travel_one_by_one(tmp_path: Path) -> None:
    the_job = job(tmp_path)
    clients = the_job.config.clients.model_copy(update={"update_checks": UpdateChecks(norm=10)})
    config = the_job.config.model_copy(update={"clients": clients})
    (block,) = ResultBatcher(replace(the_job, config=config), Plays()).serve(given([0, 1]), 60)
    assert block.means == ()
    assert [outcome.update.payload.adapter.tolist() for outcome in block.outcomes] == SENT[:2].tolist()
