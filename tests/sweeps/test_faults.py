"""Sweeps whose processes die, and sweeps of tiers and silos, on a real local cluster."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from calling import Calling

import fedray
from fedray.federation.events import RoundFinished
from fedray.results.run_result import RunResult

SILO = {
    "phone": {"share": 0.5, "num_cpus": 0.5, "num_gpus": 0, "lora_rank": 4},
    "silo": {"share": 0.5, "num_cpus": 0.5, "num_gpus": 0, "workers": 2, "batch_size": 4, "actors": 1},
}


@pytest.fixture
def base(tiny: dict[str, Any]) -> dict[str, Any]:
    clients = {"count": 4, "per_round": 3, "actors": 2, "num_cpus": 1}
    return {**tiny, "method": "fedalt", "clients": clients, "device": "cpu", "rounds": 3, "evaluation": {"every": 1}}


def processes(name: str) -> list[psutil.Process]:
    family = psutil.Process().children(recursive=True)
    return [one for one in family if one.is_running() and f"ray::{name}" in "".join(_words(one))]


def ended(name: str) -> bool:
    """Return whether none is left; a process takes a moment to end after its owner."""
    until = time.monotonic() + 20
    while (left := processes(name)) and time.monotonic() < until:
        time.sleep(0.1)
    return not left


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.mark.slow
def test_a_trial_whose_process_dies_is_lost_and_continued(base: dict[str, Any], cluster: None, tmp_path: Path) -> None:
    """Its client actors, all that the cluster has room for, are taken from it for the next trial."""
    killed: list[int] = []

    def on_event(event: Any) -> None:
        if isinstance(event, RoundFinished) and event.trial == "0000" and not killed:
            for process in processes("TrialActor"):
                killed.append(process.pid)
                process.kill()

    output, space = tmp_path / "sweep", {"train.lr": [1e-3, 2e-3]}
    found = fedray.sweep(base, space, max_concurrent=1, output=output, callbacks=[Calling(on_event)])
    assert killed
    assert found.to_pandas().status.tolist() == ["lost", "finished"]
    assert "its process ended" in found.ended["0000"].error
    assert not found.complete
    assert ended("ClientActor")
    whole = fedray.sweep(base, space, max_concurrent=1, resume=output)
    assert whole.to_pandas().status.tolist() == ["finished"] * 2
    mine = RunResult.load(whole.folder("0000"))
    assert mine.events().action.str.contains("continued after").any()
    alone = fedray.run(whole.trials[0].config, runtime="inline", output=tmp_path / "alone")
    assert mine["fedalt"].state_sha256 == alone["fedalt"].state_sha256


@pytest.mark.slow
def test_tiers_in_a_sweep(base: dict[str, Any], cluster: None, tmp_path: Path) -> None:
    """Two at a time, each with an actor of half a CPU for either tier: the bits of a run of its own."""
    tiers = {
        "strong": {"share": 0.5, "num_cpus": 0.5, "actors": 1},
        "weak": {"share": 0.5, "num_cpus": 0.5, "actors": 1, "lora_rank": 4},
    }
    base = {**base, "clients": {"count": 4, "tiers": tiers}}
    found = fedray.sweep(base, {"seed": [3, 4, 5]}, max_concurrent=2, output=tmp_path / "sweep")
    assert found.to_pandas().status.tolist() == ["finished"] * 3
    for trial in found.trials[::2]:
        alone = fedray.run(trial.config, runtime="inline", output=tmp_path / trial.id)
        assert RunResult.load(found.folder(trial))["fedalt"].state_sha256 == alone["fedalt"].state_sha256


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_silos_in_a_sweep(base: dict[str, Any], cluster: None, tmp_path: Path) -> None:
    """Each trial starts its own workers, and they end with it."""
    base = {**base, "clients": {"count": 4, "tiers": SILO}, "rounds": 2}
    found = fedray.sweep(base, {"train.lr": [1e-3, 2e-3]}, max_concurrent=1, output=tmp_path / "sweep")
    assert found.to_pandas().status.tolist() == ["finished"] * 2
    assert ended("RayTrainWorker")
    for trial in found.trials:
        alone = fedray.run(trial.config, runtime="inline", output=tmp_path / trial.id)
        mine, theirs = (summary["fedalt"] for summary in (RunResult.load(found.folder(trial)), alone))
        assert np.isclose(mine.personalised_mean, theirs.personalised_mean, atol=1e-6)
        assert mine.uplink_bytes == theirs.uplink_bytes
