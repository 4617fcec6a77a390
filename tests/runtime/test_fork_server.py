"""The fork server: what its children are, when it is used, and when it ends."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from fedray.runtime import fork_server as module
from fedray.runtime.fork_server import SWITCH, fork_server

PATIENCE_S = 60.0
LAUNCHER = Path(module.__file__).with_name("forked_worker.py")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a fork server")

PROGRAM = """
import json, os, sys
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
}
Path("found.part").write_text(json.dumps(found))
Path("found.part").rename("found.json")
"""


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_has_gpu", lambda: False)
    monkeypatch.delenv(SWITCH, raising=False)


def eventually(condition: Callable[[], Any]) -> None:
    """Wait until a condition holds."""
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def started(command: str, folder: Path, **variables: str) -> dict[str, Any]:
    """Start PROGRAM in a folder as Ray starts workers, and return what it wrote."""
    (folder / "code").mkdir()
    (folder / "code" / "program.py").write_text(PROGRAM)
    with (folder / "output").open("w") as output:
        subprocess.run(
            f"exec {command} code/program.py one 'two words'",
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


def test_a_child_has_the_libraries_and_everything_of_the_process_that_asked(no_gpu: None, tmp_path: Path) -> None:
    with fork_server() as command:
        assert command is not None
        found = started(command, tmp_path, FEDRAY_TEST="7")
    assert is_forked(found)
    assert found["imported"] == ["torch", "peft", "pyreft"], "without Ray, which reads its settings when imported"
    assert found["variable"] == "7"
    assert found["first"] == "code"
    assert found["leader"], "Ctrl-C in the terminal is not for workers"


@pytest.mark.parametrize("other", ["another PYTHONPATH", "no server"])
def test_a_worker_starts_by_itself(other: str, tmp_path: Path) -> None:
    path = os.environ.get("PYTHONPATH", "") if other == "no server" else "/nowhere"
    found = started(shlex.join([sys.executable, "-I", "-S", str(LAUNCHER), "nobody-listens", path]), tmp_path)
    assert not is_forked(found)
    assert found["imported"] == []


def test_blocks_share_a_server_and_the_outermost_ends_it(no_gpu: None) -> None:
    before = set(psutil.Process().children())
    with fork_server() as outer:
        (server,) = set(psutil.Process().children()) - before
        with fork_server() as inner:
            assert inner == outer
        assert server.is_running()
    assert not server.is_running()
    with fork_server() as other:
        assert other != outer


def test_it_ends_with_the_process_that_started_it(no_gpu: None) -> None:
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
    eventually(lambda: not server.is_running() or server.status() == psutil.STATUS_ZOMBIE)


def test_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_has_gpu", lambda: True)
    with fork_server() as command:
        assert command is None
    monkeypatch.setattr(module, "_has_gpu", lambda: False)
    monkeypatch.setenv(SWITCH, "0")
    with fork_server() as command:
        assert command is None
    monkeypatch.delenv(SWITCH)
    monkeypatch.setattr(sys, "platform", "darwin")
    with fork_server() as command:
        assert command is None


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
