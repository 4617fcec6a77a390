"""Waiting for what other processes do."""

import time
from collections.abc import Callable
from typing import Any

import psutil


def eventually(condition: Callable[[], Any], patience_s: float = 60.0) -> None:
    """Wait until a condition holds.

    Raises:
        AssertionError: it does not hold after the given seconds.
    """
    until = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def has_ended(process: psutil.Process) -> bool:
    """Return whether a process has ended, even if its parent has not yet asked for its exit code."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
