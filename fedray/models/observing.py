"""Tells the modules of a model whether what they observe is recorded."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_OBSERVED: ContextVar[bool] = ContextVar("observed", default=True)


@contextmanager
def unobserved() -> Iterator[None]:
    """Record nothing of the forward passes within.

    Generation reads every prompt once more, goes on for rows whose text has ended until the last one of their batch
    has, and tries texts that it drops: means over its tokens would depend on batches and decoding.
    """
    token = _OBSERVED.set(False)
    try:
        yield
    finally:
        _OBSERVED.reset(token)


def observed() -> bool:
    """Return whether the current forward pass is recorded."""
    return _OBSERVED.get()
