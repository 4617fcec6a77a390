"""Metrics, one per file, and the choice of the configured one. No metric imports torch.

`METRICS` finds a module by its name and takes its `ENTRY`.

Uses: config.
"""

from collections.abc import Iterable
from typing import Final

from fedray.config import EvaluationConfig
from fedray.config.metric import METRICS, Metric
from fedray.errors import ConfigError, choices
from fedray.types import Task

_DEFAULTS: Final[dict[Task, str]] = {
    "classification": "accuracy",
    "regression": "pearson",
    "causal_lm": "token_accuracy",
}


def configured_metrics(evaluation: EvaluationConfig, task: Task) -> tuple[Metric, ...]:
    """Return the metrics that the configuration names, or else the task's default; at least one."""
    return evaluation.metrics or (default_metric(task),)


def configured_metric(evaluation: EvaluationConfig, task: Task) -> Metric:
    """Return the first of the configured metrics, by which models are compared and selected."""
    return configured_metrics(evaluation, task)[0]


def generates_text(metrics: Iterable[Metric]) -> bool:
    """Return whether one of the metrics compares generated text."""
    return any(metric.reads == "texts" for metric in metrics)


def default_metric(task: Task) -> Metric:
    """Return accuracy, pearson or token_accuracy."""
    return METRICS.find(_DEFAULTS[task])()


def check_metric(metric: Metric, task: Task) -> None:
    """Check that a metric can be computed for a task.

    Raises:
        ConfigError: it cannot; the message lists the built-in metrics that can.
    """
    if task not in metric.tasks:
        fitting = [name for name in METRICS.names if task in METRICS.find(name).tasks]
        raise ConfigError(
            f"evaluation.metrics: {metric.label!r} cannot be computed for the task {task!r}; "
            f"allowed: {choices(fitting)}"
        )
