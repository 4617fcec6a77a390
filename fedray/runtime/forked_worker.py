"""Starts a Ray worker as a child of the fork server (`fork_server.py`): a program that needs nothing but Python's own
library.

    python -I -S forked_worker.py ADDRESS PYTHONPATH PROGRAM ARGUMENT...

Args:
    ADDRESS: of the server's socket.
    PYTHONPATH: the environment variable as it was when the server started. With another one, or without a server, the
        worker is started as Ray would have.
"""

import json
import os
import resource
import socket
import sys
from itertools import dropwhile
from pathlib import Path

PID_BYTES = 8
"""Bytes in which the server says a process's number."""


def main() -> None:
    address, path, *program = sys.argv[1:]
    if os.environ.get("PYTHONPATH", "") == path:
        try:
            with asked(address, argv=[*dropwhile(is_option, program)]) as server:
                if server.recv(PID_BYTES):  # it has forked
                    return
        except OSError:
            pass  # the server has ended
    os.execv(sys.executable, [sys.executable, *program])


def asked(address: str, **program: object) -> socket.socket:
    """Ask the fork server for a child; return the connection, over which it says the child's number.

    Args:
        address: of the server's socket.
        program: what the child runs (`forking.Request`).

    Raises:
        OSError: there is no such server.
    """
    request = json.dumps(own() | program).encode()
    server = socket.socket(socket.AF_UNIX)
    try:
        server.connect(f"\0{address}")
        socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
        server.sendall(request)
    except BaseException:
        server.close()
        raise
    return server


def own() -> dict[str, object]:
    """Return what the child is to have of this process."""
    return {
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "limits": {name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if is_limit(name)},
        "oom_score_adj": Path("/proc/self/oom_score_adj").read_text(encoding="ascii"),
    }


def is_option(word: str) -> bool:
    """Return whether a word before the program's name is one of Python's own options, which the server has already."""
    return word.startswith("-")


def is_limit(name: str) -> bool:
    return name.startswith("RLIMIT_")


if __name__ == "__main__":
    main()
