"""A run as a child of the fork server: it has the libraries that it needs from the start.

The process that a user starts, `fedray run`, is then a small one. While the fork server imports, it starts the Ray
cluster; afterwards it passes on signals, waits for the run, and ends the cluster. The libraries are imported once, and
in the time that Ray takes to start.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from fedray.errors import FedrayError
from fedray.runtime.fork_server import PARENTS_CLUSTER, ForkServer, fork_server
from fedray.runtime.forked_worker import PID_BYTES, asked

NO_PRESTART = "RAY_prestart_worker_first_driver"
"""Ray's setting for workers that start before they are needed: they would be this process's, which needs none."""


def run_apart(arguments: Sequence[str]) -> int | None:
    """Run `fedray` with these arguments in a child of a fork server, on a cluster that this process starts.

    Returns:
        The exit code; None: this is the child, or this machine can have no such server, or there is a cluster already,
        and the caller goes on by itself.

    Raises:
        ConfigError: a cluster is named, and does not answer.
        FedrayError: Ray could not be started, or the child was killed.
    """
    if PARENTS_CLUSTER in os.environ or os.environ.get("RAY_ADDRESS", "local") != "local":
        return None
    with fork_server() as server:  # first: it imports while this process imports Ray
        if server is None:
            return None
        import ray

        from fedray.runtime.session import check_reachable, connected

        if check_reachable():
            return None
        os.environ.setdefault(NO_PRESTART, "0")
        with connected():
            options = {
                "address": ray.get_runtime_context().gcs_address,
                "runtime_env": {"py_executable": server.worker_command},
            }
            return _run(server, arguments, options)


def _run(server: ForkServer, arguments: Sequence[str], cluster: dict[str, object]) -> int | None:
    """Run `fedray` in a child of the server; return its exit code, or None if the server has died.

    Args:
        cluster: options with which the child's `ray.init` connects to the cluster.

    Raises:
        FedrayError: the child was killed.
    """
    request = {
        "argv": [sys.argv[0], *arguments],
        "environment": {**os.environ, PARENTS_CLUSTER: json.dumps(cluster)},
        "module": "fedray",
        "path": sys.path[0],
        "waited_for": True,
    }
    try:
        with asked(server.address, **request) as connection:
            if not (number := connection.recv(PID_BYTES)):
                return None
            with _passed_on(int.from_bytes(number, "big")):
                code = connection.recv(1)
    except OSError:
        return None
    if not code:
        raise FedrayError("the run's process was killed; what it has recorded can be continued with --resume")
    return code[0]


@contextmanager
def _passed_on(pid: int) -> Iterator[None]:
    """Within the block, pass Ctrl-C and SIGTERM on to a process."""

    def pass_on(number: int, _: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
