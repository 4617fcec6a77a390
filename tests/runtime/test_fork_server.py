"""The fork server: what its children are, when it is used, and when it ends."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from eventually import eventually, has_ended

import fedray
from fedray.runtime import fork_server as module
from fedray.runtime.fork_server import SWITCH, fork_server

LAUNCHER = Path(module.__file__).with_name("forked_worker.py")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a fork server")

PROGRAM = """
import json, os, resource, sys
from pathlib import Path

parent = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\\0")
print("said", flush=True)
found = {
    "arguments": sys.argv[1:],
    "folder": os.getcwd(),
    "first": sys.path[0],
    "variable": os.environ.get("FEDRAY_TEST"),
    "name": __name__,
    "parent": parent,
    "imported": [name for name in ("torch", "peft", "pyreft", "ray") if name in sys.modules],
    "leader": os.getsid(0) == os.getpid(),
    "open files": resource.getrlimit(resource.RLIMIT_NOFILE),
    "oom": Path("/proc/self/oom_score_adj").read_text().strip(),
    "names": [name for name in ("evaluate", "matplotlib.pyplot", "lm_eval", "bitsandbytes.nn") if name in sys.modules],
    "path": sys.path,
}
if "torch" in sys.modules:
    import random, numpy, torch
    found["draws"] = [random.random(), numpy.random.rand(), torch.rand(1).item()]
    found["threads"] = torch.get_num_threads()
Path("found.part").write_text(json.dumps(found))
Path("found.part").rename("found.json")
"""


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has no cluster, and so no fork server, on a machine without a GPU."""
    monkeypatch.setattr(module, "_server", None)
    monkeypatch.setattr(module, "_has_gpu", lambda: False)
    monkeypatch.delenv(SWITCH, raising=False)


@contextmanager
def new_server() -> Iterator[tuple[str, psutil.Process]]:
    """Yield a fork server's command and its process."""
    before = set(psutil.Process().children())
    with fork_server() as server:
        assert server is not None
        (process,) = set(psutil.Process().children()) - before
        yield server.worker_command, process


def started(command: str, folder: Path, before: str = "", options: str = "", **variables: str) -> dict[str, Any]:
    """Start PROGRAM in a folder as Ray starts workers, after another command, and return what it wrote.

    Args:
        options: Python's, before the program.
    """
    (folder / "code").mkdir(parents=True)
    (folder / "code" / "program.py").write_text(PROGRAM)
    with (folder / "output").open("w") as output:
        subprocess.run(
            f"{before} exec {command} {options} code/program.py one 'two words'",
            shell=True,
            check=True,
            cwd=folder,
            env={**os.environ, **variables},
            stdout=output,
        )
        eventually((folder / "found.json").is_file)
    assert (folder / "output").read_text() == "said\n"
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    assert found["arguments"] == ["one", "two words"]
    assert found["folder"] == str(folder)
    assert found["name"] == "__main__"
    return found


def is_forked(found: dict[str, Any]) -> bool:
    return any(word.endswith("forking.py") for word in found["parent"])


def test_a_child_has_the_libraries_and_everything_of_the_process_that_asked(alone: None, tmp_path: Path) -> None:
    with new_server() as (command, _):
        found = started(command, tmp_path, FEDRAY_TEST="7")
    assert is_forked(found)
    assert found["imported"] == ["torch", "peft", "pyreft"], "without Ray, which reads its settings when imported"
    assert found["variable"] == "7"
    assert found["first"] == "code"
    assert found["leader"], "Ctrl-C in the terminal is not for workers"
    assert found["threads"] == 1
    assert found["names"] == [], "neither what no worker needs nor what only stands for another module"


def test_options_that_ray_puts_before_the_program(alone: None, tmp_path: Path) -> None:
    """As with PYTHONNOUSERSITE=1."""
    with new_server() as (command, _):
        assert is_forked(started(command, tmp_path, options="-s -S"))


def test_the_options_of_this_process_are_the_servers(alone: None, tmp_path: Path) -> None:
    program = (
        "from fedray.runtime import fork_server as module\n"
        "module._has_gpu = lambda: False\n"
        "with module.fork_server() as server:\n"
        "    print(*server.process.args)\n"
    )
    command = [sys.executable, "-O", "-s", "-W", "always::DeprecationWarning", "-c", program]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert {"-O", "-s", "-Walways::DeprecationWarning"} <= set(found.split())


def test_limits_are_those_of_the_process_that_asked(alone: None, tmp_path: Path) -> None:
    with new_server() as (command, _):
        found = started(command, tmp_path, "ulimit -n 200; echo 700 > /proc/self/oom_score_adj;")
    assert found["open files"] == [200, 200]
    assert found["oom"] == "700"


def test_children_draw_different_random_numbers(alone: None, tmp_path: Path) -> None:
    with new_server() as (command, _):
        one, other = (started(command, tmp_path / name)["draws"] for name in ("one", "other"))
    assert all(a != b for a, b in zip(one, other, strict=True))


def test_a_safe_path_stays_safe(alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}/mine:{Path(fedray.__file__).parents[1]}")
    with new_server() as (command, _):
        found = started(command, tmp_path)
    assert is_forked(found)
    assert found["path"][0] == f"{tmp_path}/mine"
    assert "code" not in found["path"]


EXTRAS = ("lm_eval", "bitsandbytes", "wandb", "mlflow", "gguf", "rouge_score", "deepspeed")


def test_it_needs_no_extra(alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({EXTRAS!r}))\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(fedray.__file__).parents[1]}")
    with new_server() as (command, _):
        found = started(command, tmp_path)
    assert is_forked(found)
    assert "torch" in found["imported"]


def test_it_cannot_be_started(alone: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refused)
    with fork_server() as server:
        assert server is None
    assert "Resource temporarily unavailable" in caplog.text


def test_it_ended_early(alone: None, caplog: pytest.LogCaptureFixture) -> None:
    with new_server() as (_, server):
        server.kill()
        eventually(lambda: server.status() == psutil.STATUS_ZOMBIE)
    assert "the fork server ended early (-9)" in caplog.text


def test_a_child_ends_as_programs_do_and_not_after_its_server(alone: None, tmp_path: Path) -> None:
    program = (
        "import atexit, pathlib, sys, time\n"
        "atexit.register(pathlib.Path(sys.argv[1] + '.ended').touch)\n"
        "pathlib.Path(sys.argv[1] + '.begun').touch()\n"
        "time.sleep(float(sys.argv[2]))\n"
        "sys.exit(3)\n"
    )
    (tmp_path / "program.py").write_text(program)
    with new_server() as (command, server):
        for name, seconds in (("short", 0), ("long", 1000)):
            subprocess.run(f"{command} program.py {name} {seconds}", shell=True, check=True, cwd=tmp_path)
        eventually((tmp_path / "short.ended").exists)
        eventually((tmp_path / "long.begun").exists)
        eventually(lambda: len(server.children()) == 1)
        (child,) = server.children()
    eventually(lambda: has_ended(child))
    assert not (tmp_path / "long.ended").exists()


def test_an_exit_with_a_text_prints_it(alone: None, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("import sys\nsys.exit('why it ended')\n")
    with new_server() as (command, _):
        subprocess.run(f"{command} program.py 2> told", shell=True, check=True, cwd=tmp_path)
        eventually(lambda: (tmp_path / "told").read_text() == "why it ended\n")


def test_nobody_waits_for_the_child_any_more(alone: None, tmp_path: Path) -> None:
    """Ray kills what has started a worker for too long, and starts another one."""
    with new_server() as (command, server):
        with socket.socket(socket.AF_UNIX) as lost:
            lost.connect(f"\0{shlex.split(command)[-2]}")
            (tmp_path / "lost" / "code").mkdir(parents=True)
            (tmp_path / "lost" / "code" / "program.py").write_text(PROGRAM)
            request = {"argv": ["code/program.py"], "environment": {}, "folder": str(tmp_path / "lost"), "limits": {}}
            message = json.dumps(request | {"oom_score_adj": "0"}).encode()
            socket.send_fds(lost, [len(message).to_bytes(8, "big")], [0, 1, 2])
            lost.sendall(message)
        with socket.socket(socket.AF_UNIX) as nonsense:
            nonsense.connect(f"\0{shlex.split(command)[-2]}")
            nonsense.sendall(b"GET / HT")
        assert is_forked(started(command, tmp_path)), "the server still serves"
        eventually(lambda: server.children() == [])
        assert not (tmp_path / "lost" / "found.json").exists()


@pytest.mark.parametrize("other", ["another PYTHONPATH", "no server"])
def test_a_worker_starts_by_itself(other: str, tmp_path: Path) -> None:
    path = os.environ.get("PYTHONPATH", "") if other == "no server" else "/nowhere"
    found = started(shlex.join([sys.executable, "-I", "-S", str(LAUNCHER), "nobody-listens", path]), tmp_path)
    assert not is_forked(found)
    assert found["imported"] == []


def test_blocks_share_a_server_and_the_outermost_ends_it(alone: None) -> None:
    with new_server() as (outer, server):
        with fork_server() as inner:
            assert inner is not None
            assert inner.worker_command == outer
        assert server.is_running()
    assert not server.is_running()
    with fork_server() as other:
        assert other is not None
        assert other.worker_command != outer


def test_it_ends_with_the_process_that_started_it(alone: None) -> None:
    program = (
        "from fedray.runtime import fork_server as module\n"
        "module._has_gpu = lambda: False\n"
        "with module.fork_server():\n"
        "    print('started', flush=True)\n"
        "    input()\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "started\n"
    (server,) = psutil.Process(owner.pid).children()
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    eventually(lambda: has_ended(server))


def test_where_there_is_none(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_has_gpu", lambda: True)
    with fork_server() as server:
        assert server is None
    monkeypatch.setattr(module, "_has_gpu", lambda: False)
    monkeypatch.setenv(SWITCH, "0")
    with fork_server() as server:
        assert server is None
    monkeypatch.delenv(SWITCH)
    monkeypatch.setattr(sys, "platform", "darwin")
    with fork_server() as server:
        assert server is None


@ray.remote(num_cpus=0)
class Newcomer:
    """An actor that tells what it had to import."""

    def imports(self) -> tuple[list[str], list[str]]:
        """Return the command line of its parent, and which libraries client actors and drivers imported here."""
        before = set(sys.modules)
        import fedray.runtime.client_actor
        import fedray.runtime.driver  # noqa: F401

        new = {name.partition(".")[0] for name in set(sys.modules) - before}
        return psutil.Process(os.getppid()).cmdline(), sorted(new)


@pytest.mark.skipif(module._has_gpu(), reason="machines with a GPU have no fork server")
def test_actors_have_nothing_large_left_to_import(cluster: None) -> None:
    actor = Newcomer.remote()
    parent, imported = ray.get(actor.imports.remote())  # type: ignore[attr-defined]
    assert any(word.endswith("forking.py") for word in parent)
    assert "fedray" in imported
    large = {"torch", "transformers", "peft", "pyreft", "pyvene", "datasets", "pandas", "sklearn", "scipy", "numpy"}
    assert not large.intersection(imported)
