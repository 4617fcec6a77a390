"""This process's connection to a Ray cluster."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from fedray.errors import FedrayError
from fedray.runtime.address import check_address


@contextmanager
def connected() -> Iterator[None]:
    """Keep this process connected to a Ray cluster within the block: the one that it is already connected to, or else
    the one that RAY_ADDRESS names or that runs on this machine, or else a new one that ends with the block.

    Raises:
        ConfigError: RAY_ADDRESS names a cluster that does not answer.
        FedrayError: no cluster could be reached or started.
    """
    if ray.is_initialized():
        yield
        return
    start_ray(include_dashboard=None if os.environ.get("RAY_ADDRESS") else False)
    try:
        yield
    finally:
        ray.shutdown()


def check_reachable() -> None:
    """Check that a cluster that `connected` would connect to answers, which takes a moment.

    Raises:
        ConfigError: it does not answer.
    """
    if not ray.is_initialized():
        check_address()


def start_ray(**options: Any) -> None:
    """Connect quietly to the cluster that RAY_ADDRESS names or that runs on this machine, or start a new one.

    Ray gives a new node 30 seconds to start, which is too little on a busy machine, so a timeout is retried twice.

    Args:
        options: passed on to `ray.init`.

    Raises:
        ConfigError: RAY_ADDRESS names a cluster that does not answer.
        FedrayError: no cluster could be reached or started.
    """
    if "address" not in options:
        check_address()
    for last in (False, False, True):
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
            return
        except Exception as error:  # Ray raises a bare Exception if its node does not start
            ray.shutdown()
            if last or "timed out" not in str(error):
                raise FedrayError(f"Ray: no cluster could be reached or started: {error}") from error
