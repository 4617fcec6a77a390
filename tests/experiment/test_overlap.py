"""A round is written while the first tasks of the next one run."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from tiny import tiny_bert

from fedray.config import load_config
from fedray.errors import FedrayError
from fedray.experiment.prepare import Prepared, prepare
from fedray.experiment.run import run_experiment
from fedray.federation.events import Event, MethodFinished, RoundFinished, TasksFinished
from fedray.federation.failures import FailedAttempt
from fedray.federation.local_pool import LocalPool
from fedray.federation.result_batches import ResultBatch
from fedray.federation.tasks import ClientTask
from fedray.methods.fedavg import FedAvg
from fedray.results.run_result import RunResult
from fedray.storage.state_tree import arrays
from fedray.storage.tables import read_table

ROUNDS = 3
"""The final pass is the fourth time that tasks are handed out."""


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    config = {
        "rounds": ROUNDS,
        "method": "fedavg",
        "model": tiny_bert(),
        "data": {"source": "synthetic", "examples_per_client": 12, "max_length": 16},
        "partition": {"kind": "by_file"},
        "clients": {"count": 2},
        "lora": {"rank": 1},
        "evaluation": {"every": 0},
        "device": "cpu",
        "runtime": "inline",
    }
    return prepare(load_config(config))


class AheadPool(LocalPool):
    """A pool that hands out its tasks, as actors take them, before it waits for results.

    Args:
        fails: number of the round whose tasks fail.
        handed_out: whether they were handed out before.

    Attributes:
        written: by round, how many rounds the folder had when its tasks were handed out, and when it came to their
            results.
    """

    def __init__(self, prepared: Prepared, folder: Path, fails: int | None = None, handed_out: bool = True):
        super().__init__(prepared.data.shards)
        self.folder, self.fails, self.handed_out = folder, fails, handed_out
        self.written: list[tuple[int, int]] = []

    def train(self, tasks: Sequence[ClientTask]) -> Iterator[ResultBatch | FailedAttempt | None]:  # type: ignore[override]
        failing = len(self.written) == self.fails
        before = self._rounds()
        if failing and not self.handed_out:
            raise FedrayError("the cluster is gone")
        yield None
        self.written.append((before, self._rounds()))
        if failing:
            raise FedrayError("the actors are gone")
        yield from super().train(tasks)

    def _rounds(self) -> int:
        return read_table(self.folder, "rounds").num_rows


def names(events: Sequence[Event]) -> list[Any]:
    """The ends of rounds and of clients' tasks, in order."""
    ends = [event for event in events if isinstance(event, RoundFinished | TasksFinished)]
    return [("round" if isinstance(event, RoundFinished) else "tasks", event.server_round) for event in ends]


def in_turn(rounds: int) -> list[Any]:
    """The ends of rounds of two clients."""
    return [(kind, number) for number in range(rounds) for kind in ("tasks", "tasks", "round")]


def test_a_round_is_written_while_the_next_one_runs(prepared: Prepared, tmp_path: Path) -> None:
    """All but the last one: what ends a run after its last round finds no tasks. The ends of rounds come in the same
    order, and the results are the same."""
    states = []
    for overlap, written in ((True, [(0, 0), (0, 1), (1, 2), (3, 3)]), (False, [(0, 0), (1, 1), (2, 2), (3, 3)])):
        folder = tmp_path / str(overlap)
        pool = AheadPool(prepared, folder)
        events = list(run_experiment(prepared, pool, folder, overlap=overlap))
        assert pool.written == written
        assert names(events) == in_turn(ROUNDS + 1)
        assert len(RunResult.load(folder).clients()) == 2 * (ROUNDS + 1)
        (summary,) = (event.summary for event in events if isinstance(event, MethodFinished))
        states.append(summary.state_sha256)
    assert states[0] == states[1]


@pytest.mark.parametrize("handed_out", [True, False])
def test_a_round_is_written_if_the_next_one_fails(prepared: Prepared, tmp_path: Path, handed_out: bool) -> None:
    """Before its tasks are handed out, or later. The run continues after the written round, to the same bits."""
    pool = AheadPool(prepared, tmp_path / "broken", fails=2, handed_out=handed_out)
    events: list[Event] = []
    with pytest.raises(FedrayError, match=r"the (cluster|actors)"):
        events.extend(run_experiment(prepared, pool, tmp_path / "broken", overlap=True))
    assert names(events) == in_turn(2)
    assert list(pd.read_parquet(tmp_path / "broken" / "rounds.parquet").server_round) == [0, 1]
    again = AheadPool(prepared, tmp_path / "broken")
    finished = list(run_experiment(prepared, again, tmp_path / "broken", resume=True, overlap=True))
    assert names(finished) == in_turn(4)[6:]
    whole = list(run_experiment(prepared, LocalPool(prepared.data.shards), tmp_path / "whole"))
    assert finished[-1].summary.state_sha256 == whole[-1].summary.state_sha256  # type: ignore[union-attr]


def test_checkpoints_are_those_of_their_rounds_however_late_they_are_written(
    prepared: Prepared, tmp_path: Path
) -> None:
    """This pool never says that tasks run, as none does in a round without tasks: such a round has ended before the one
    before it is written."""
    found = []
    for overlap in (True, False):
        folder, checkpoints = tmp_path / str(overlap), list[Any]()
        for event in run_experiment(prepared, LocalPool(prepared.data.shards), folder, overlap=overlap):
            if isinstance(event, RoundFinished) and not event.final:
                manifest = folder / "checkpoints" / "fedavg" / f"{event.server_round + 1:05d}" / "manifest.json"
                facts = json.loads(manifest.read_text().splitlines()[0])  # the second one is its hash
                checkpoints.append([facts["server_round"], facts["server"], facts["totals"]["uplink_bytes"]])
        found.append(checkpoints)
    assert found[0] == found[1]
    numbers, servers, sent = zip(*found[0], strict=True)
    assert numbers == (1, 2, 3)
    assert len({server["sha256"] for server in servers}) == 3
    assert sent == (sent[0], 2 * sent[0], 3 * sent[0])


def test_a_caller_that_ends_the_run_leaves_the_finished_rounds(prepared: Prepared, tmp_path: Path) -> None:
    run = run_experiment(prepared, AheadPool(prepared, tmp_path), tmp_path, overlap=True)
    for event in run:
        if isinstance(event, RoundFinished) and event.server_round == 1:
            break
    run.close()  # type: ignore[attr-defined]
    assert list(pd.read_parquet(tmp_path / "rounds.parquet").server_round) == [0, 1]


def test_a_method_that_changes_its_server_while_it_sends_is_refused(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that is written meanwhile would contain the change, and a continued run would repeat it."""
    sends = FedAvg.configure_train

    def halved(method: FedAvg, server: Any, cohort: Any) -> Any:
        for array in arrays(server).values():
            array *= 0.5
        return sends(method, server, cohort)

    monkeypatch.setattr(FedAvg, "configure_train", halved)
    with pytest.raises(FedrayError, match="fedavg: configure_train changes the server's state; only aggregate_train"):
        list(run_experiment(prepared, LocalPool(prepared.data.shards), tmp_path))
