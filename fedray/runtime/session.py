"""This process's connection to a Ray cluster."""

import json
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from fedray.errors import FedrayError
from fedray.runtime.address import check_address
from fedray.runtime.fork_server import PARENTS_CLUSTER, ForkServer, fork_server

_parents_cluster: dict[str, Any] | None = json.loads(os.environ.pop(PARENTS_CLUSTER, "null"))
"""Options with which `ray.init` connects to the cluster that the parent has started for this process (`apart.py`)."""


@contextmanager
def connected(**options: Any) -> Iterator[None]:
    """Keep this process connected to a Ray cluster within the block: the one that it is already connected to, or else
    its parent's, or else the one that RAY_ADDRESS names or that runs on this machine, or else a new one that ends with
    the block.

    Args:
        options: passed on to `ray.init`.

    Raises:
        ConfigError: RAY_ADDRESS names a cluster that does not answer.
        FedrayError: no cluster could be reached or started.
    """
    if ray.is_initialized():
        yield
        return
    with workers_ready(local=options.get("address") == "local") as server:
        if server is not None:
            options |= {"runtime_env": {"py_executable": server.worker_command}}
        options |= _parents_cluster or {}
        try:
            with _uninterrupted():
                exists = _parents_cluster or (os.environ.get("RAY_ADDRESS") or "local") != "local"
                _start_ray(include_dashboard=None if exists else False, **options)
            yield
        finally:
            ray.shutdown()


@contextmanager
def workers_ready(local: bool = False) -> Iterator[ForkServer | None]:
    """Check that the cluster to which `connected` would connect answers, which takes a moment; if `connected` would
    start a new one, import what its workers need, in the background and once (`fork_server`).

    Args:
        local: a new one will be started in any case.

    Yields:
        The fork server for the new cluster, if there is one.

    Raises:
        ConfigError: the cluster does not answer.
    """
    if local or not check_reachable():
        with fork_server() as server:
            yield server
    else:
        yield None


def check_reachable() -> bool:
    """Check that the cluster to which `connected` would connect answers, which takes a moment; return whether there is
    one.

    Raises:
        ConfigError: it does not answer.
    """
    return ray.is_initialized() or _parents_cluster is not None or check_address() is not None


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Put off Ctrl-C and SIGTERM to the end of the block, if Python handles them, and keep their handlers: if one ends
    `ray.init` half-way, Ray crashes when the process ends, and Ray's own handler of SIGTERM aborts the process."""
    main = threading.current_thread() is threading.main_thread()  # only it gets signals
    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM) if main}
    handlers = {number: handler for number, handler in found.items() if callable(handler)}
    arrived: list[int] = []
    for number in handlers:
        signal.signal(number, lambda number, _: arrived.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if arrived:
        handlers[signal.Signals(arrived[0])](arrived[0], None)


def _start_ray(**options: Any) -> None:
    """Connect quietly to the cluster that RAY_ADDRESS names or that runs on this machine, or start a new one.

    Ray gives a new node 30 seconds to start, which is too little on a busy machine, so a timeout is retried twice.

    Args:
        options: passed on to `ray.init`.

    Raises:
        FedrayError: no cluster could be reached or started.
    """
    for last in (False, False, True):
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
            return
        except Exception as error:  # Ray raises a bare Exception if its node does not start
            ray.shutdown()
            if last or "timed out" not in str(error):
                raise FedrayError(f"Ray: no cluster could be reached or started: {error}") from error
