"""Drivers, nodes and disks that fail, and somebody who presses Ctrl-C: what was finished stays, and the bits too."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import psutil
import pytest
from calling import Calling
from interruptible import start_run
from limits import mounted

import fedray
from fedray.config import load_config
from fedray.errors import ConfigError, FedrayError, StorageError
from fedray.experiment.prepare import prepare
from fedray.federation.events import Event, MethodStarted, RoundFinished
from fedray.results.run_result import RunResult
from fedray.runtime.driver import events

HELPERS = Path(__file__).parents[1] / "helpers"


@pytest.fixture
def config(tiny: dict[str, Any]) -> dict[str, Any]:
    """A method that keeps states; two actors."""
    clients = {"count": 6, "per_round": 5, "actors": 2, "num_cpus": 1}
    return {**tiny, "method": ["fedalt"], "clients": clients, "rounds": 4, "device": "cpu"}


@pytest.fixture
def whole(config: dict[str, Any], tmp_path: Path) -> RunResult:
    return fedray.run(config, runtime="inline", output=tmp_path / "whole")


def assert_same(path: Path, whole: RunResult) -> None:
    found = RunResult.load(path)
    assert found["fedalt"].state_sha256 == whole["fedalt"].state_sha256
    assert found.rounds().clients.tolist() == whole.rounds().clients.tolist()


def actors(name: str) -> list[psutil.Process]:
    family = psutil.Process().children(recursive=True)  # Ray's node is a child of this process
    return [process for process in family if f"ray::{name}" in "".join(process.cmdline())]


def test_a_driver_that_dies_is_started_again(
    config: dict[str, Any], whole: RunResult, cluster: None, tmp_path: Path
) -> None:
    """It goes on with what the first driver measured: the seconds per example."""
    begun, resolved = [], []
    config["clients"] |= {"actors": 1, "deadline_s": 1e6}
    for event in events(prepare(load_config(config)), tmp_path / "run"):
        if isinstance(event, MethodStarted):
            begun.append(event.server_round)
        if isinstance(event, RoundFinished) and event.server_round == 1 and len(begun) == 1:
            resolved.append((tmp_path / "run" / "config.yaml").read_text())
            for driver in actors("DriverActor"):
                driver.kill()
    assert len(begun) == 2
    assert "example_seconds: null" not in resolved[0]
    assert (tmp_path / "run" / "config.yaml").read_text() == resolved[0]
    assert begun[1] >= 2, "the rounds that were finished are not trained again"
    assert_same(tmp_path / "run", whole)
    assert pd.read_parquet(tmp_path / "run" / "events.parquet").kind.tolist() == ["interrupted"]


@pytest.mark.slow
def test_a_driver_that_keeps_dying_ends_the_run(config: dict[str, Any], cluster: None, tmp_path: Path) -> None:
    def on_event(event: Event) -> None:
        if isinstance(event, MethodStarted):
            for driver in actors("DriverActor"):
                driver.kill()

    with pytest.raises(FedrayError, match="the driver died"):
        fedray.run(config, output=tmp_path / "run", callbacks=[Calling(on_event)])


@pytest.mark.slow
def test_an_exception_on_the_driver_ends_the_run_at_once(config: dict[str, Any], cluster: None, tmp_path: Path) -> None:
    """It would come again: the round is not trained a second time."""
    begun: list[Event] = []
    failing = load_config(config, {"method": {"class": "server_fault.BrokenServer"}})
    started = Calling(lambda event: begun.extend([event] if isinstance(event, MethodStarted) else []))
    with pytest.raises(FedrayError, match=r"an exception on the driver.*(\n.*)*KeyError: 'no such round'"):
        fedray.run(failing, output=tmp_path / "run", callbacks=[started])
    assert len(begun) == 1


@pytest.mark.slow
def test_what_is_put_beside_its_caller_is_there(own_cluster: None) -> None:
    """A driver on another node would be lost with that one."""
    done = subprocess.run([sys.executable, str(HELPERS / "on_callers_node.py")], check=True, capture_output=True)
    assert int(done.stdout.split()[-1]) == 6


@pytest.mark.slow
def test_a_node_that_disappears_costs_nothing_but_time(
    config: dict[str, Any], whole: RunResult, own_cluster: None, tmp_path: Path
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    command = [sys.executable, str(HELPERS / "lost_node.py"), str(file), str(tmp_path / "run")]
    subprocess.run(command, check=True, timeout=300)
    assert_same(tmp_path / "run", whole)
    rows = RunResult.load(tmp_path / "run").events()
    assert set(rows.kind) <= {"actor died", "lost object"}
    assert rows.action.eq("rerun").all()


def alive_in(group: int) -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if _session(process) == group]


def _session(process: psutil.Process) -> int:
    try:
        return os.getsid(process.pid) if process.status() != psutil.STATUS_ZOMBIE else -1
    except (ProcessLookupError, psutil.Error):
        return -1


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_ctrl_c_and_sigterm_leave_a_checkpoint_and_no_process(
    number: signal.Signals,
    code: int,
    word: str,
    config: dict[str, Any],
    whole: RunResult,
    own_cluster: None,
    tmp_path: Path,
) -> None:
    file, run = tmp_path / "config.json", tmp_path / "run"
    file.write_text(json.dumps(config))
    process = start_run(file, run)
    before = {p.pid for p in psutil.Process(process.pid).children(recursive=True)}
    while not (run / "checkpoints" / "fedalt" / "00001" / "manifest.json").exists():
        assert process.poll() is None
        before |= {p.pid for p in psutil.Process(process.pid).children(recursive=True)}
        time.sleep(0.05)
    before |= {p.pid for p in psutil.Process(process.pid).children(recursive=True)}
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"{word}; to continue: fedray run {file} --resume {run}".encode() in told
    deadline = time.monotonic() + 20
    while (left := [pid for pid in before if psutil.pid_exists(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left
    fedray.run(config, runtime="inline", resume=run)
    assert_same(run, whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "size=260k") as folder:
        yield folder


@pytest.mark.parametrize("runtime", ["inline", pytest.param("ray", marks=pytest.mark.slow)])
def test_a_full_disk_ends_the_run_and_with_more_room_it_is_continued(
    config: dict[str, Any], whole: RunResult, cluster: None, small_disk: Path, runtime: Literal["ray", "inline"]
) -> None:
    run = small_disk / "run"
    finished = []

    def on_event(event: Event) -> None:
        if isinstance(event, RoundFinished):
            finished.append(event.server_round)

    with pytest.raises(StorageError, match=rf"{run}.*: cannot be written: .*No space left on device.*--resume"):
        fedray.run(config, runtime=runtime, output=run, callbacks=[Calling(on_event)])
    assert finished, "rounds have been finished before the disk was full"
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    events: list[Event] = []
    fedray.run(config, runtime=runtime, resume=run, callbacks=[Calling(events.append)])
    begun = next(event for event in events if isinstance(event, MethodStarted))
    assert begun.server_round == len(finished)
    assert_same(run, whole)


@pytest.mark.slow
def test_a_cache_that_is_full_on_a_node_ends_the_run_at_once(
    config: dict[str, Any], cluster: None, small_disk: Path, tmp_path: Path
) -> None:
    """The tokens fit, and were written by the process that checks the experiment; the base model does not."""
    cache = small_disk / "cache"
    large = {**config["model"]["config"], "intermediate_size": 2048}
    changes = {"data.cache_dir": str(cache), "model.config": large}
    with pytest.raises(ConfigError, match=rf"data\.cache_dir: {cache}/backbones cannot be written: .*No space left"):
        fedray.run(load_config(config, changes), output=tmp_path / "run")
    assert list((cache / "tokens").iterdir())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_driver_that_the_memory_monitor_ends_says_so(
    config: dict[str, Any], own_cluster: None, tmp_path: Path
) -> None:
    """Ray is told that 1 % of the memory is too much."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    command = [sys.executable, "-m", "fedray", "run", str(file), "--output", str(tmp_path / "run")]
    limits = {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "100", "RAY_ADDRESS": "local"}
    done = subprocess.run(command, env={**os.environ, **limits}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert "error: the driver died: memory ran out on node" in done.stderr
    assert "Ray ended the driver (process" in done.stderr
    assert "use fewer or smaller actors" in done.stderr
