"""A process that imports torch, transformers and peft once, and from which Ray's workers on this machine are forked:
they start in a second instead of five, and share the memory of what they have imported.

Ray starts a worker with the command that a runtime environment names as `py_executable`. Here it is
`forked_worker.py`, which hands its arguments, environment and files to the server over a socket. The server's child
then runs Ray's own program for workers. Where the server cannot be reached, `forked_worker.py` runs that program.

Only for a Ray cluster that this process starts: other clusters have machines of their own. The server has no threads
that a child would miss, and has not imported Ray, because Ray reads its settings from the environment when imported.
"""

import logging
import os
import secrets
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.util import _args_from_interpreter_flags  # type: ignore[attr-defined]
from pathlib import Path

SWITCH = "FEDRAY_FORK_SERVER"
"""With 0 in this environment variable, every worker imports for itself."""

PARENTS_CLUSTER = "FEDRAY_PARENTS_CLUSTER"
"""Environment variable that tells a forked run of its cluster (`session`, `apart`)."""

GPUS = ("nvidia[0-9]*", "nvhost*", "dxg", "kfd")
"""Devices of GPUs: Nvidia's, those of its small boards, those of Windows, AMD's."""

log = logging.getLogger(__name__)

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class ForkServer:
    """A running fork server.

    Attributes:
        address: of its socket.
        worker_command: starts a Ray worker with it.
    """

    process: "subprocess.Popen[bytes]"
    address: str
    worker_command: str


_server: ForkServer | None = None
"""This process's."""


@contextmanager
def fork_server() -> Iterator[ForkServer | None]:
    """Keep a fork server within the block, and yield it; None: this machine has none, and workers are started as
    always. A block within another has the same server.

    Machines with a GPU have none: a process that was forked may not use what its parent has begun with a GPU, and what
    the libraries begin when they are imported depends on their versions.
    """
    global _server
    if _server is not None or (server := _started()) is None:
        yield _server
        return
    _server = server
    try:
        yield server
    finally:
        _server = None
        if (code := server.process.poll()) is not None:
            log.warning("the fork server ended early (%d): workers had to import everything for themselves", code)
        server.process.kill()  # it may be importing still
        server.process.communicate()


def _started() -> ForkServer | None:
    """Return a new server; None: this machine can have none."""
    if sys.platform != "linux" or os.environ.get(SWITCH) == "0" or _has_gpu():
        return None
    address = f"fedray-{os.getpid()}-{secrets.token_hex(8)}"
    options: list[str] = _args_from_interpreter_flags()  # this Python's, as `multiprocessing` passes them on
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"\0{address}")  # a name that ends with the socket
            listener.listen(socket.SOMAXCONN)
            process = subprocess.Popen(
                [sys.executable, *options, str(_HERE / "forking.py"), str(listener.fileno())],
                pass_fds=[listener.fileno()],
                stdin=subprocess.PIPE,  # its end is the server's end, also when this process is killed
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for this process, which then ends Ray and the server
                env={"OMP_NUM_THREADS": "1", **os.environ},  # as Ray sets it for workers
            )
    except OSError as error:  # a sandbox without such sockets, or no memory for a process
        log.warning("workers have to import everything for themselves: %s", error)
        return None
    path = os.environ.get("PYTHONPATH", "")
    command = shlex.join([sys.executable, "-I", "-S", str(_HERE / "forked_worker.py"), address, path])
    return ForkServer(process, address, command)


def _has_gpu() -> bool:
    """Return whether this machine has a GPU; torch would begin with it if it were asked."""
    return any(next(Path("/dev").glob(pattern), None) for pattern in GPUS)
