"""Metrics, one per file, and the choice of the configured one. No metric imports torch.

`METRICS` finds a module by its name and takes its `ENTRY`.

Uses: config.
"""

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


def configured_metric(evaluation: EvaluationConfig, task: Task) -> Metric:
    """Return the metric that the configuration names, or else the task's default."""
    return evaluation.metric or default_metric(task)


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
            f"evaluation.metric: {metric.label!r} cannot be computed for the task {task!r}; allowed: {choices(fitting)}"
        )
