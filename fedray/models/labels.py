"""Lets whoever runs a model say which tokens are the prompt, without handing the model labels to take a loss on."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_LABELS: ContextVar[Tensor | None] = ContextVar("labels", default=None)


@contextmanager
def labelled(labels: Tensor) -> Iterator[None]:
    """Let the forward passes within know the labels, [examples, tokens] with -100 at the prompt.

    Interventions on a language model need them: `f1+l1` means the prompt's first and last token, and the answer would
    count as prompt. Labels of another shape (classes) mean nothing to them and are ignored.
    """
    token = _LABELS.set(labels)
    try:
        yield
    finally:
        _LABELS.reset(token)


def current_labels() -> Tensor | None:
    """Return the labels of the innermost `labelled`, or None outside."""
    return _LABELS.get()
