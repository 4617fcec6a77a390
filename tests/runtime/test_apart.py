"""`fedray run` as a program: the run is a child of the fork server, and what was started is a small process."""

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from eventually import eventually, has_ended
from interruptible import start_run

import fedray
from fedray.results.run_result import RunResult
from fedray.runtime.fork_server import SWITCH

PATIENCE_S = 180.0

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a fork server")


@pytest.fixture
def config(tiny: dict[str, Any], tmp_path: Path) -> Path:
    """A run that has enough rounds to be looked at."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(tiny | {"rounds": 200}))
    return file


def until(path: Path, program: Any) -> None:
    """Wait for a file while a program runs."""

    def there() -> bool:
        assert program.poll() is None
        return path.exists()

    eventually(there, PATIENCE_S)


def family(program: Any) -> list[psutil.Process]:
    return psutil.Process(program.pid).children(recursive=True)


def the_run(program: Any) -> psutil.Process:
    """Return the process of the run: the fork server's child that is no worker of Ray's."""
    servers = [one for one in family(program) if "forking.py" in " ".join(one.cmdline())]
    (run,) = [one for one in servers if one.ppid() in {other.pid for other in servers}]
    return run


def reach(processes: list[psutil.Process], *states: str) -> None:
    """Wait until all processes are in one of these states."""
    eventually(lambda: all(one.status() in states for one in processes), PATIENCE_S)


@pytest.mark.parametrize(
    ("forks", "variables"), [(True, {}), (True, {"RAY_AUTH_TOKEN": "5" * 64}), (False, {SWITCH: "0"})]
)
def test_it_gives_the_bits_of_any_other_run(
    forks: bool, variables: dict[str, str], tiny: dict[str, Any], own_cluster: None, tmp_path: Path
) -> None:
    """Also where Ray's processes ask each other for a token."""
    file = tmp_path / "config.json"
    tiny["method"] = ["fedavg", "fedalt"]
    file.write_text(json.dumps(tiny))
    program = start_run(file, tmp_path / "apart", **variables)
    until(tmp_path / "apart" / "config.yaml", program)
    small = not any("libtorch" in place.path for place in psutil.Process(program.pid).memory_maps())
    _, told = program.communicate(timeout=PATIENCE_S)
    assert program.returncode == 0, told
    assert small == forks
    expected = fedray.run(tiny, runtime="inline", output=tmp_path / "inline")
    found = RunResult.load(tmp_path / "apart")
    assert [one.state_sha256 for one in found.summaries] == [one.state_sha256 for one in expected.summaries]


def test_its_errors_and_its_exit_code_are_those_of_the_command(
    tiny: dict[str, Any], own_cluster: None, tmp_path: Path
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(tiny | {"model": {"path": str(tmp_path / "missing")}}))
    program = start_run(file, tmp_path / "run")
    _, told = program.communicate(timeout=PATIENCE_S)
    assert program.returncode == 2
    assert told.decode() == f"error: {tmp_path}/missing: no such folder\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("changes", "code"), [({"rounds": -1}, 2), ({"runtime": "inline", "rounds": 1}, 0)])
def test_where_none_is_needed_the_fork_server_that_had_begun_is_ended(
    changes: dict[str, Any], code: int, smallest: dict[str, Any], own_cluster: None, tmp_path: Path
) -> None:
    """It begins before the configuration has been read."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(smallest | changes))
    program = start_run(file, tmp_path / "run")
    eventually(lambda: family(program), PATIENCE_S)
    (server,) = family(program)
    if not code:
        eventually(lambda: has_ended(server), PATIENCE_S)
        assert program.poll() is None, "the run goes on without it"
    _, told = program.communicate(timeout=PATIENCE_S)
    assert program.returncode == code, told
    assert has_ended(server)


def test_a_run_that_is_killed_is_told_of_and_leaves_nothing(config: Path, own_cluster: None, tmp_path: Path) -> None:
    program = start_run(config, tmp_path / "run")
    until(tmp_path / "run" / "rounds.parquet", program)
    others = family(program)
    the_run(program).kill()
    _, told = program.communicate(timeout=PATIENCE_S)
    assert program.returncode == 1
    assert told.endswith(b"error: the run's process was killed; what it has recorded can be continued with --resume\n")
    eventually(lambda: all(map(has_ended, others)), PATIENCE_S)


def test_a_run_that_a_signal_ends_before_it_can_handle_it(config: Path, own_cluster: None, tmp_path: Path) -> None:
    """Ctrl-Z stops both processes. A stopped one does not handle signals, until it is killed."""
    program = start_run(config, tmp_path / "run")
    until(tmp_path / "run" / "rounds.parquet", program)
    both = [psutil.Process(program.pid), the_run(program)]
    program.send_signal(signal.SIGTSTP)
    reach(both, psutil.STATUS_STOPPED)
    program.send_signal(signal.SIGCONT)
    reach(both, psutil.STATUS_SLEEPING, psutil.STATUS_RUNNING)
    both[1].suspend()
    reach(both[1:], psutil.STATUS_STOPPED)
    program.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    both[1].kill()
    _, told = program.communicate(timeout=PATIENCE_S)
    assert program.returncode == 143
    assert told.endswith(b"terminated\n")


def test_nothing_outlives_the_program_that_was_started(config: Path, own_cluster: None, tmp_path: Path) -> None:
    """Ray's own two agents look only every minute whether their node is there."""
    program = start_run(config, tmp_path / "run")
    until(tmp_path / "run" / "rounds.parquet", program)
    others = [one for one in family(program) if not one.name().endswith("Agent")]
    assert the_run(program) in others
    program.send_signal(signal.SIGKILL)
    program.communicate(timeout=PATIENCE_S)
    eventually(lambda: all(map(has_ended, others)), PATIENCE_S)
