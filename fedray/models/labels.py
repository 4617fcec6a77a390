"""Tells the modules of a model which tokens of a batch are the prompt, without computing a loss on labels."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_LABELS: ContextVar[Tensor | None] = ContextVar("labels", default=None)


@contextmanager
def labelled(labels: Tensor) -> Iterator[None]:
    """Make labels known to the forward passes within.

    Interventions on a language model need them: `f1+l1` means the prompt's first and last token, and the answer would
    count as prompt. Labels of another shape (classes) are ignored.

    Args:
        labels: [examples, tokens], -100 at the prompt.
    """
    token = _LABELS.set(labels)
    try:
        yield
    finally:
        _LABELS.reset(token)


def current_labels() -> Tensor | None:
    """Return the labels of the innermost `labelled`, or None outside."""
    return _LABELS.get()
