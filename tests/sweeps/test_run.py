"""Sweeps on a real local cluster: the same numbers as run by run, shared actors and data, failures, early ends."""

from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import psutil
import pytest
from calling import Calling

import fedray
from fedray.errors import ConfigError
from fedray.experiment.run_folder import lock_folder
from fedray.federation.events import RoundFinished
from fedray.results.run_result import RunResult
from fedray.storage.paths import StoragePath
from fedray.sweeps.result import SweepResult, TrialFinished

LR = [1e-3, 1e-2]


@pytest.fixture
def base(tiny: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    return {
        **tiny,
        "method": "fedavg",
        "clients": {"count": 4, "per_round": 3, "num_cpus": 1},
        "device": "cpu",
        "data": {**tiny["data"], "cache_dir": str(tmp_path / "cache")},
    }


def client_actors() -> set[int]:
    found = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "ray::ClientActor" in "".join(process.cmdline()):
                found.add(process.pid)
    return found


def test_trials_are_runs(base: dict[str, Any], cluster: None, tmp_path: Path) -> None:
    """Every trial has the bits of a run of its own; actors are lent from one to the next, and data are loaded once for
    each seed. A trial that fails is kept, and hinders nobody."""
    told: list[Any] = []
    actors: set[int] = set()

    def on_event(event: Any) -> None:
        told.append(event)
        actors.update(client_actors())

    space = {"method": ["fedavg", "fedalt"], "train.lr": [LR[1], 1e30], "seed": [3, 4]}
    reported = base | {"report": True}
    found = fedray.sweep(reported, space, output=tmp_path / "sweep", max_concurrent=2, callbacks=[Calling(on_event)])

    table = found.to_pandas()
    assert table.status.tolist() == (["finished"] * 2 + ["failed"] * 2) * 2
    assert table.error.str.contains("loss").tolist() == [status == "failed" for status in table.status]
    for trial in found.trials[:6:5]:
        alone = fedray.run(trial.config, runtime="inline", report=False, output=tmp_path / trial.id)
        mine = RunResult.load(found.folder(trial))
        assert mine.summaries[0].state_sha256 == alone.summaries[0].state_sha256
        assert found.ended[trial.id].metrics["personalised_mean"] == alone.summaries[0].personalised_mean
    ended = [event for event in told if isinstance(event, TrialFinished)]
    assert sorted(event.trial.id for event in ended) == [trial.id for trial in found.trials]
    for trial in found.trials[:2]:
        rounds = [event for event in told if isinstance(event, RoundFinished) and event.trial == trial.id]
        assert [(event.server_round, event.final) for event in rounds] == [(0, False), (1, False), (2, True)]
    assert len(actors) == 2, "eight trials, two client actors"
    assert client_actors() == set(), "none outlives the sweep"
    assert "Trials without a result" in (tmp_path / "sweep" / "report.html").read_text()
    assert not list((tmp_path / "sweep" / "trials").rglob("report.html")), "one report for all trials"
    assert len(found.over_seeds()) == 2
    assert pd.read_parquet(tmp_path / "sweep" / "trials.parquet").shape == table.shape
    assert found.best is not None
    best = fedray.load_config(tmp_path / "sweep" / "best.yaml")
    assert best == found.best.config


@pytest.mark.slow
def test_data_are_loaded_once(
    base: dict[str, Any], cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in the actor that loads them. (Base weights: `tests/models/test_backbone.py`.)"""
    from fedray.sweeps import run as module

    loads: list[int] = []
    shelf = module.DatasetCache

    class Watched:
        @staticmethod
        def options(**options: Any) -> Any:
            return SimpleNamespace(remote=lambda: Watched.started(options))

        @staticmethod
        def started(options: dict[str, Any]) -> Any:
            handle = shelf.options(**options).remote()  # type: ignore[attr-defined]
            monkeypatch.setattr(module.ray, "kill", lambda actor: ending(handle, actor))
            return handle

    kill = module.ray.kill

    def ending(handle: Any, actor: Any) -> None:
        if actor is handle:
            loads.append(module.ray.get(handle.num_loads.remote()))
        kill(actor)

    monkeypatch.setattr(module, "DatasetCache", Watched)
    fedray.sweep(base, {"train.lr": [1e-3, 2e-3, 3e-3], "seed": [3, 4]}, output=tmp_path / "sweep", max_concurrent=2)
    assert loads == [2], "six trials, two seeds"


@pytest.mark.slow
def test_the_bad_end_early(base: dict[str, Any], cluster: None, tmp_path: Path) -> None:
    """One after another, after the first round those with a loss above the median so far: large rates do harm."""
    space = {"train.lr": [1e-9, 0.05, 0.1, 0.2]}
    found = fedray.sweep(
        base | {"rounds": 4, "runtime": "inline"},
        space,
        metric="train_loss",
        scheduler={"kind": "asha", "grace_rounds": 1, "reduction_factor": 2},
        max_concurrent=1,
        output=tmp_path / "sweep",
    )
    table = found.to_pandas()
    assert table.status[0] == "finished"
    assert table.status.tolist() == ["finished", "stopped", "stopped", "stopped"]
    assert table.rounds_done.tolist() == [4, 1, 1, 1]
    assert (table.train_loss[1:] > table.train_loss[0]).all()
    assert found.best is not None
    assert found.best.point["train.lr"] == 1e-9


def test_a_sweep_that_was_interrupted_goes_on(base: dict[str, Any], cluster: None, tmp_path: Path) -> None:
    """Finished trials are not run again, and one that had begun goes on from its checkpoint."""

    class Stop(Exception):
        pass

    def on_event(event: Any) -> None:
        if isinstance(event, RoundFinished) and event.trial == "0001":
            raise Stop

    inline = base | {"runtime": "inline"}
    arguments: dict[str, Any] = {"space": {"train.lr": [*LR, 3e-3]}, "max_concurrent": 1}
    with pytest.raises(Stop):
        fedray.sweep(inline, **arguments, output=tmp_path / "sweep", callbacks=[Calling(on_event)])
    before = SweepResult.load(tmp_path / "sweep")
    assert set(before.ended) == {"0000"}
    summary = (before.folder("0000") / "summary.json").local
    written = summary.stat().st_mtime_ns
    found = fedray.sweep(inline, **arguments, resume=tmp_path / "sweep")
    assert found.complete
    assert summary.stat().st_mtime_ns == written
    continued = RunResult.load(found.folder("0001"))
    assert continued.events().action.str.contains("continued after 1 rounds").any()
    whole = fedray.run(found.trials[1].config, output=tmp_path / "whole")
    assert continued.summaries[0].state_sha256 == whole.summaries[0].state_sha256
    with pytest.raises(
        ConfigError, match=r"cannot be continued as another sweep.*\n  space.train.lr.2: stored is 0.003, given is None"
    ):
        fedray.sweep(inline, {"train.lr": LR}, max_concurrent=1, resume=tmp_path / "sweep")
    again = fedray.sweep(inline | {"callbacks": [{"class": "fedray.Callback"}]}, **arguments, resume=tmp_path / "sweep")
    assert again.complete


def test_more_trials_at_a_time_than_there_is_room(base: dict[str, Any], cluster: None, tmp_path: Path) -> None:
    output = tmp_path / "sweep"
    with pytest.raises(ConfigError, match="max_concurrent: 3, but the cluster has room for 2 trials at a time"):
        fedray.sweep(base, {"seed": [1, 2, 3, 4]}, max_concurrent=3, output=output)
    two = {**base["clients"], "actors": 2}
    with pytest.raises(ConfigError, match="room for 1 trials at a time"):
        fedray.sweep({**base, "clients": two}, {"seed": [1, 2]}, max_concurrent=2, output=output)
    assert [path.name for path in output.iterdir()] == [".lock"], "the folder is free for another try"


def test_selection_needs_validation_examples(base: dict[str, Any], cluster: None, tmp_path: Path) -> None:
    without = {**base, "runtime": "inline", "rounds": 1, "partition": {"validation_fraction": 0}}
    with pytest.raises(ConfigError, match=r"compared on validation examples, and there are none; set partition\.val"):
        fedray.sweep(without, {"train.lr": LR}, output=tmp_path / "sweep")
    found = fedray.sweep(without, {"train.lr": LR}, select_on="test", output=tmp_path / "sweep")
    assert found.best is not None
    assert found.over_seeds()["selection"].tolist() == found.over_seeds()["mean"].tolist()


def test_two_processes_do_not_run_one_sweep(
    base: dict[str, Any], cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedray.experiment.run_folder.LOCK_PATIENCE_S", 0.1)
    lock = lock_folder(StoragePath.of(tmp_path / "sweep"))
    with pytest.raises(ConfigError, match="another process is writing here"):
        fedray.sweep(base, {"seed": [1, 2]}, output=tmp_path / "sweep")
    assert lock is not None
    lock.release()


def test_tunes_ranges_are_understood(base: dict[str, Any], cluster: None, tmp_path: Path) -> None:
    from ray import tune

    from fedray.sweeps.run import _plain_values

    assert _plain_values("a", tune.loguniform(1e-4, 1)) == {"loguniform": [1e-4, 1]}
    assert _plain_values("a", tune.uniform(0, 1)) == {"uniform": [0, 1]}
    assert _plain_values("a", tune.randint(1, 9)) == {"randint": [1, 9]}
    assert _plain_values("a", tune.choice([4, 8])) == {"choice": [4, 8]}
    assert _plain_values("a", tune.grid_search([1, 2])) == [1, 2]
    assert _plain_values("a", [1, 2]) == [1, 2]
    for other in (tune.randn(0, 1), tune.quniform(0, 1, 0.1), tune.lograndint(1, 9), tune.sample_from(lambda _: 1)):
        with pytest.raises(ConfigError, match="is not supported"):
            _plain_values("a", other)
