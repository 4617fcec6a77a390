"""Metrics: functions of predictions and references, by name, and which of them fits which task.

accuracy, matthews, pearson, token_accuracy take two arrays of shape [n]; perplexity takes the losses of single tokens,
[n]; exact_match and rouge_l take generated and reference texts.
"""

import re
import string
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from fedray.errors import ConfigError, choices, nearest
from fedray.types import Task

Metric = Literal["accuracy", "matthews", "pearson", "token_accuracy", "perplexity", "exact_match", "rouge_l"]
Numbers = npt.NDArray[Any]

GENERATED: Final[frozenset[str]] = frozenset({"exact_match", "rouge_l"})
"""Metrics of generated text; they need a tokenizer."""

_ALLOWED: Final[dict[Task, tuple[Metric, ...]]] = {
    "classification": ("accuracy", "matthews"),
    "regression": ("pearson",),
    "causal_lm": ("token_accuracy", "perplexity", "exact_match", "rouge_l"),
}


def accuracy(predictions: Numbers, references: Numbers) -> float:
    """Return the share of equal entries; for answer tokens this is token_accuracy."""
    return float(np.mean(predictions == references))


def matthews(predictions: Numbers, references: Numbers) -> float:
    """Return the (multi-class) Matthews correlation; 0.0 where either side has a single class."""
    from sklearn.metrics import matthews_corrcoef  # a second of import that only this metric should cost each actor

    return float(matthews_corrcoef(references, predictions))


def pearson(predictions: Numbers, references: Numbers) -> float:
    """Return Pearson's correlation; 0.0 where either side is constant (where it is undefined)."""
    x, y = (np.asarray(side, dtype=np.float64) for side in (predictions, references))
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def perplexity(losses: Numbers) -> float:
    """Return exp of the mean loss (in nats) of the tokens; inf where that exceeds a float64."""
    with np.errstate(over="ignore"):
        return float(np.exp(np.mean(losses, dtype=np.float64)))


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the share of texts equal up to case, spacing, and punctuation at both ends."""
    return float(np.mean([_normal(a) == _normal(b) for a, b in zip(predictions, references, strict=True)]))


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the mean ROUGE-L F-measure in [0, 1]: 2PR / (P + R) with P, R the longest common subsequence of words over
    the words of prediction and reference. Words are runs of letters and digits of any script, without case."""
    return float(np.mean([_rouge_l(_words(a), _words(b)) for a, b in zip(predictions, references, strict=True)]))


_FUNCTIONS: Final[dict[str, Callable[..., float]]] = {
    "accuracy": accuracy,
    "matthews": matthews,
    "pearson": pearson,
    "token_accuracy": accuracy,
    "perplexity": perplexity,
    "exact_match": exact_match,
    "rouge_l": rouge_l,
}


def metric_function(name: str) -> Callable[..., float]:
    """Return the function with this name.

    Raises:
        ConfigError: no metric has this name.
    """
    if name not in _FUNCTIONS:
        raise ConfigError(
            f"evaluation.metric: unknown {name!r}{nearest(name, _FUNCTIONS)}; allowed: {choices(_FUNCTIONS)}"
        )
    return _FUNCTIONS[name]


def default_metric(task: Task) -> Metric:
    """Return accuracy, pearson or token_accuracy."""
    return _ALLOWED[task][0]


def check_metric(name: str, task: Task) -> None:
    """Check that a metric can be computed for a task.

    Raises:
        ConfigError: it cannot; the message lists those that can.
    """
    metric_function(name)
    if name not in _ALLOWED[task]:
        raise ConfigError(
            f"evaluation.metric: {name!r} cannot be computed for the task {task!r}; allowed: {choices(_ALLOWED[task])}"
        )


def higher_is_better(name: str) -> bool:
    """Return False for perplexity, True for every other metric.

    Raises:
        ConfigError: no metric has this name.
    """
    metric_function(name)
    return name != "perplexity"


def _normal(text: str) -> str:
    return " ".join(text.casefold().split()).strip(string.punctuation + " ")


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.casefold())


def _rouge_l(prediction: list[str], reference: list[str]) -> float:
    common = _longest_common_subsequence(prediction, reference)
    return 2 * common / (len(prediction) + len(reference)) if common else 0.0


def _longest_common_subsequence(a: list[str], b: list[str]) -> int:
    """Length by dynamic programming; row[j] belongs to the words of `a` so far and the first j words of `b`."""
    row = [0] * (len(b) + 1)
    for word in a:
        above_left = 0
        for j, other in enumerate(b, start=1):
            above_left, row[j] = row[j], above_left + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]
