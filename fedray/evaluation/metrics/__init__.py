"""Metrics, one per file, and the choice of the configured one. No metric imports torch.

`METRICS` finds a module by its name and takes its `ENTRY`.

Uses: config, data, evaluation.
"""

from collections.abc import Iterable, Sequence
from typing import Final

from fedray.config import Config, EvaluationConfig
from fedray.config.metric import METRICS, Metric
from fedray.data.sources.hub import Hub
from fedray.errors import ConfigError, choices, nearest
from fedray.types import Task

_DEFAULTS: Final[dict[Task, str]] = {
    "classification": "accuracy",
    "regression": "pearson",
    "causal_lm": "token_accuracy",
}

GLUE: Final = ("nyu-mll/glue", "glue")
"""The hub's names of GLUE."""

_GLUE: Final[dict[str, tuple[str | dict[str, str], ...]]] = {
    "cola": ("matthews",),
    "sst2": ("accuracy",),
    "mrpc": ("accuracy", {"name": "f1", "positive": "equivalent"}),
    "stsb": ("pearson", "spearman", "combined"),
    "qqp": ("accuracy", {"name": "f1", "positive": "duplicate"}),
    "mnli": ("accuracy",),
    "mnli_matched": ("accuracy",),
    "mnli_mismatched": ("accuracy",),
    "qnli": ("accuracy",),
    "rte": ("accuracy",),
    "wnli": ("accuracy",),
}


def configured_metrics(config: Config) -> tuple[Metric, ...]:
    """Return the metrics that the configuration names, or else those of its task of GLUE, or else the task's default;
    at least one."""
    data = config.data
    if config.evaluation.metrics:
        return config.evaluation.metrics
    if isinstance(data, Hub) and data.name in GLUE and data.config in _GLUE:
        return glue_metrics(data.config)
    return (default_metric(config.task),)


def configured_metric(config: Config) -> Metric:
    """Return the first of the configured metrics, by which models are compared and selected."""
    return configured_metrics(config)[0]


def generates_text(metrics: Iterable[Metric]) -> bool:
    """Return whether one of the metrics compares generated text."""
    return any(metric.reads == "texts" for metric in metrics)


def ranks_options(metrics: Iterable[Metric]) -> bool:
    """Return whether one of the metrics compares the likelihoods of an example's options."""
    return any(metric.reads == "likelihoods" for metric in metrics)


def default_metric(task: Task) -> Metric:
    """Return accuracy, pearson or token_accuracy."""
    return METRICS.find(_DEFAULTS[task])()


def glue_metrics(config_name: str) -> tuple[Metric, ...]:
    """Return the metrics of a task of GLUE (Wang et al., 2018, arXiv 1804.07461, table 1), the first one first.

    They are those of the library `evaluate` (metrics/glue), and for STS-B the mean of its two as well. The positive
    class of F1 is named as the hub's `nyu-mll/glue` names it, whose class 1 it is: class names are sorted, so its index
    may be another one.

    Args:
        config_name: the hub's name of the task, such as `mrpc`.

    Raises:
        ConfigError: GLUE has no such task.
    """
    if config_name not in _GLUE:
        raise ConfigError(f"GLUE has no task {config_name!r}{nearest(config_name, _GLUE)}; allowed: {choices(_GLUE)}")
    return tuple(METRICS.parse(value) for value in _GLUE[config_name])


def for_classes(config: Config, label_names: Sequence[str]) -> EvaluationConfig:
    """Return the section `evaluation` with the configured metrics for these classes (see `Metric.for_classes`).

    Raises:
        ConfigError: a metric names a class that the data does not have.
    """
    metrics = tuple(metric.for_classes(label_names) for metric in configured_metrics(config))
    return config.evaluation.model_copy(update={"metrics": metrics})


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
