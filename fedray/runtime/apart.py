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
from contextlib import contextmanager, nullcontext, suppress
from types import FrameType

from fedray.errors import FedrayError
from fedray.runtime.fork_server import PARENTS_CLUSTER, ForkServer, fork_server
from fedray.runtime.forked_worker import PID_BYTES, asked

NO_PRESTART = "RAY_prestart_worker_first_driver"
"""Ray's setting for workers that start before they are needed: they would be this process's, which needs none."""


@contextmanager
def begun() -> Iterator[None]:
    """Within the block, import what a run needs, while this process prepares for `run_apart`."""
    with nullcontext() if _has_cluster() else fork_server():
        yield


def run_apart(arguments: Sequence[str], path: str) -> int | None:
    """Run `fedray` with these arguments in a child of a fork server, on a cluster that this process starts.

    Args:
        path: where the child looks for modules first.

    Returns:
        The exit code; None: this is the child, or this machine can have no such server, or there is a cluster already,
        and the caller goes on by itself.

    Raises:
        ConfigError: a cluster is named, and does not answer.
        FedrayError: Ray could not be started, or the child was killed.
        KeyboardInterrupt: so was it, by a signal.
    """
    if _has_cluster():
        return None
    with fork_server() as server:  # first: it imports while this process imports Ray
        if server is None:
            return None
        import ray

        from fedray.runtime.session import check_reachable, connected

        if check_reachable():
            return None
        hidden = set() if NO_PRESTART in os.environ else {NO_PRESTART}
        os.environ.setdefault(NO_PRESTART, "0")
        with connected():
            environment = {name: value for name, value in os.environ.items() if name not in hidden}
            options = {
                "address": ray.get_runtime_context().gcs_address,
                "runtime_env": {"py_executable": server.worker_command},
            }
            return _run(
                server,
                argv=[sys.argv[0], *arguments],
                environment={**environment, PARENTS_CLUSTER: json.dumps(options)},
                path=path,
            )


def _has_cluster() -> bool:
    """Return whether this process has been given a cluster."""
    return PARENTS_CLUSTER in os.environ or (os.environ.get("RAY_ADDRESS") or "local") != "local"


def _run(server: ForkServer, **request: object) -> int | None:
    """Run `fedray` in a child of the server; return its exit code, or None if the server has died.

    Args:
        request: see `forking.Request`.

    Raises:
        FedrayError: the child was killed.
        KeyboardInterrupt: so was it, by a signal that this process had passed on.
    """
    try:
        connection = asked(server.address, module="fedray", waited_for=True, **request)
        number = connection.recv(PID_BYTES)
    except OSError:
        return None
    with connection:
        if not number:
            return None
        with _passed_on(int.from_bytes(number, "big")) as passed:
            code = connection.recv(1)
    if code:
        return code[0]
    for signal_number in passed[:1]:  # it came before the child could handle it
        signal.raise_signal(signal_number)
    raise FedrayError("the run's process was killed; what it has recorded can be continued with --resume")


@contextmanager
def _passed_on(pid: int) -> Iterator[list[signal.Signals]]:
    """Within the block, pass Ctrl-C and SIGTERM on to a process, and stop with it on Ctrl-Z; yield a list to which the
    signals that were passed on are added."""
    passed: list[signal.Signals] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        passed.append(signal.Signals(number))
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    def stop(_: int, __: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGSTOP)
            os.kill(pid, signal.SIGCONT)

    wanted = {signal.SIGINT: pass_on, signal.SIGTERM: pass_on, signal.SIGTSTP: stop}
    before = {number: signal.getsignal(number) for number in wanted}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, wanted[number])
    try:
        yield passed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
