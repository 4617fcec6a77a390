"""The fork server's program: it imports what workers need, and then forks one for every request (`forked_worker.py`).

    python forking.py LISTENER

It ends when its standard input does.

Args:
    LISTENER: number of the open file that is the listening socket.
"""

import gc
import json
import os
import runpy
import select
import signal
import socket
import struct
import sys
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Any

ROOT = Path(__file__).parents[2]

PACKAGES = ("adapters", "aggregation", "data", "evaluation", "federation", "methods", "models", "storage", "training")
MODULES = ("fedray.experiment.run", "fedray.experiment.resume", "sklearn.metrics")
"""What drivers and client actors import, besides all modules of fedray's `PACKAGES`; not `ray`, nor what imports it."""


def import_modules() -> None:
    """Import what workers need, and exclude it from garbage collections, which would write to every page."""
    sys.path[0] = str(ROOT)
    gc.disable()
    for package in (import_module(f"fedray.{name}") for name in PACKAGES):
        for module in walk_packages(package.__path__, f"{package.__name__}."):
            import_module(module.name)
    for name in MODULES:
        import_module(name)
    libraries, process_memory = map(import_module, ("fedray.adapters.libraries", "fedray.training.process_memory"))
    libraries.import_peft()
    libraries.import_pyreft()
    assert "ray" not in sys.modules, "Ray reads its settings when it is imported: these would be the server's"
    vars(process_memory)["shares_heap"] = True
    gc.freeze()


def serve(listener: socket.socket) -> dict[str, Any]:
    """Fork a child for every request, and return the request in the child."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            sys.exit()
        connection, _ = listener.accept()
        with connection:
            if not _same_user(connection):
                continue
            try:
                request, files = _received(connection)
            except (OSError, ValueError):  # the other side has ended
                continue
            if os.fork() == 0:
                listener.close()
                _become(request, files)
                connection.sendall(b"1")
                return request
        for file in files:
            os.close(file)


def _same_user(connection: socket.socket) -> bool:
    """Return whether the other side is a process of this process's user."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", credentials)
    return bool(user == os.getuid())


def _received(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Return a request and the three standard files that came with it."""
    size, files, _, _ = socket.recv_fds(connection, 8, 3)
    with connection.makefile("rb") as stream:
        return json.loads(stream.read(int.from_bytes(size, "big"))), list(files)


def _become(request: dict[str, Any], files: list[int]) -> None:
    """Give this process the files, environment, folder and arguments of the one that made the request."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    gc.enable()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv = request["argv"]
    sys.path[0] = str(Path(sys.argv[0]).parent)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as listener:
        import_modules()
        serve(listener)
    runpy.run_path(sys.argv[0], run_name="__main__")
