"""The fork server's program: it imports what workers and runs need, and then forks a process for every request: a
worker (`forked_worker.py`), or the run itself (`apart.py`).

    python forking.py LISTENER

It ends when its standard input does.

Args:
    LISTENER: number of the open file that is the listening socket.
"""

import atexit
import ctypes
import gc
import json
import os
import resource
import runpy
import select
import signal
import socket
import struct
import sys
import traceback
from contextlib import suppress
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from pkgutil import walk_packages
from typing import TypedDict

ROOT = Path(__file__).parents[2]

PACKAGES = ("adapters", "aggregation", "data", "evaluation", "federation", "methods", "models", "storage", "training")
MODULES = (
    *("fedray.cli.app", "fedray.experiment.run", "fedray.experiment.resume", "fedray.experiment.restore"),
    *("fedray.results.memory_report", "fedray.results.score_tables", "sklearn.metrics", "requests", "jsonschema"),
)
"""What runs, drivers and client actors import, besides all modules of fedray's `PACKAGES`. Not `ray`, nor what imports
it, because Ray reads its settings when it is imported; but the largest of the libraries that Ray imports."""

HARNESS = "fedray.evaluation.harness_model"
"""Imports lm-eval, which is large, and which no worker needs."""

REQUEST_S = 5.0
"""Seconds that a request may take to arrive."""
PR_SET_PDEATHSIG = 1
"""Linux's number of the signal that a process gets when its parent ends (prctl.h)."""
LARGEST = 1 << 24
"""Bytes of the largest request."""
PID_BYTES = 8
"""Bytes in which the child says its number (`forked_worker.PID_BYTES`)."""


class Request(TypedDict, total=False):
    """What a child is to be.

    Attributes:
        argv: its arguments.
        environment, folder, limits, oom_score_adj: of the process that asks.
        module: runs as a program; otherwise the file does that is the first argument.
        path: where the module's program looks for modules first.
        waited_for: whether the child, when it ends, says its exit code over the connection.
    """

    argv: list[str]
    environment: dict[str, str]
    folder: str
    limits: dict[str, tuple[int, int]]
    oom_score_adj: str
    module: str
    path: str
    waited_for: bool


def import_modules() -> None:
    """Import what workers need, and exclude it from garbage collections, which would write to every page."""
    if not sys.flags.safe_path:
        del sys.path[0]  # this file's folder
    sys.path.insert(0, str(ROOT))
    import_module("fedray.errors")  # of the starting process's fedray, whichever Python would find
    del sys.path[0]
    gc.disable()
    libraries = import_module("fedray.adapters.libraries")
    libraries.import_peft()
    libraries.import_pyreft()
    for package in (import_module(f"fedray.{name}") for name in PACKAGES):
        for module in walk_packages(package.__path__, f"{package.__name__}."):
            if module.name != HARNESS:
                _import_if_found(module.name)
    for name in MODULES:
        _import_if_found(name)
    import_module("fedray.adapters.first_use").forget_unused()
    assert "ray" not in sys.modules, "Ray reads its settings when it is imported: these would be the server's"
    gc.freeze()


def _import_if_found(name: str) -> None:
    with suppress(ModuleNotFoundError):  # of an extra that is not installed, or that Ray has no longer
        import_module(name)


def serve(listener: socket.socket) -> tuple[Request, socket.socket]:
    """Fork a child for every request; in the child, return the request and the connection."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            sys.exit()
        connection, _ = listener.accept()
        with connection:
            files: list[int] = []
            try:
                connection.settimeout(REQUEST_S)
                request = _received(connection, files)
                if request is not None and os.fork() == 0:
                    try:
                        listener.close()
                        _become(request, files)
                        connection.sendall(os.getpid().to_bytes(PID_BYTES, "big"))
                        return request, connection.dup()
                    except BaseException:
                        os._exit(1)  # the other side has gone, or starts the worker itself
            except (OSError, ValueError):  # the other side has ended, or is none of ours
                pass
            finally:
                for file in files:
                    os.close(file)


def _received(connection: socket.socket, files: list[int]) -> Request | None:
    """Return a request, and append the three standard files that came with it; None: it is not one, or another
    user's."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", credentials)
    if user != os.getuid():
        return None
    header, received, _, _ = socket.recv_fds(connection, 8, 3)
    files += received
    if (size := int.from_bytes(header, "big")) > LARGEST:
        return None
    with connection.makefile("rb") as stream:
        request: Request = json.loads(stream.read(size))
    return request


def _become(request: Request, files: list[int]) -> None:
    """Give this process what the one that made the request has: files, environment, folder, limits, arguments."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # no child outlives the server, whatever it waits for
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    gc.enable()
    for number, file in enumerate(files):
        os.dup2(file, number)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=sys.stdout.isatty())
    for name, (soft, hard) in request["limits"].items():
        with suppress(OSError, ValueError):
            resource.setrlimit(getattr(resource, name), (soft, hard))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(request["oom_score_adj"], encoding="ascii")
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv = request["argv"]
    if not sys.flags.safe_path:
        sys.path.insert(0, request["path"] if "module" in request else str(Path(sys.argv[0]).parent))
    import_module("numpy").random.seed()  # or all children would draw the same; Python's own `random` sees to itself
    import_module("torch").default_generator.seed()


def run(request: Request) -> int:
    """Run the program of a request, and return its exit code."""
    try:
        if "module" in request:
            runpy.run_module(request["module"], run_name="__main__")
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    with socket.socket(fileno=int(sys.argv[1])) as listener:
        import_modules()
        request, connection = serve(listener)
    waited_for = request.get("waited_for", False)
    if not waited_for:
        connection.close()
    code = run(request)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # it ends already
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if waited_for:
        with suppress(OSError):
            connection.sendall(bytes([code & 0xFF]))
    os._exit(code)  # Ray's destructors, which a usual end calls, have been seen to hang


if __name__ == "__main__":
    main()
