"""The trials of a sweep: the points of its space, each an experiment with one method."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from fedray.config import Config, SweepConfig, load_config, to_mapping
from fedray.errors import ConfigError, choices
from fedray.methods.registry import build_method
from fedray.randomness import keyed_rng

RANGES = ("uniform", "loguniform", "randint", "choice")
"""Kinds of values that are drawn."""


@dataclass(frozen=True)
class Trial:
    """One experiment of a sweep, with one method.

    Attributes:
        id: the trial's name, which is also that of its folder.
        point: the trial's values by the paths of the space.
    """

    id: str
    point: Mapping[str, Any]
    config: Config

    @property
    def method(self) -> str:
        """The name of the trial's method."""
        return self.config.method[0].key


def trials_of(sweep: SweepConfig) -> tuple[Trial, ...]:
    """Return a sweep's trials, with the configuration of each checked.

    The draws from ranges are the same for every point of the grid, so that methods and seeds are compared on equal
    values. A base with several methods is a grid over them.

    Raises:
        ConfigError: the base or a value is not allowed, a path does not exist, a grid is empty, or a range has its
            bounds in the wrong order.
    """
    base = load_config(sweep.base)
    space = dict(sweep.space)
    if "method" not in space and len(base.method) > 1:
        space = {"method": to_mapping(base)["method"], **space}
    grid = {path: _grid(path, values) for path, values in space.items() if not _is_range(values)}
    ranges = {path: values for path, values in space.items() if _is_range(values)}
    if sweep.num_samples > 1 and not ranges:
        raise ConfigError(f"num_samples: {sweep.num_samples}, but the space has no range to draw from")
    points: dict[str, dict[str, Any]] = {}
    for sample in range(sweep.num_samples):
        drawn = {path: _drawn(path, values, sweep.draws_seed, sample) for path, values in ranges.items()}
        for values in product(*grid.values()):
            chosen = drawn | dict(zip(grid, values, strict=True))
            point = {path: chosen[path] for path in space}
            points.setdefault(json.dumps(point, sort_keys=True), point)  # draws from few values may repeat a point
    digits = max(4, len(str(len(points))))
    trials = tuple(Trial(f"{i:0{digits}d}", point, _config(base, point)) for i, point in enumerate(points.values()))
    _check_metric(sweep, trials)
    _check_scheduler(sweep, trials)
    return trials


def _check_metric(sweep: SweepConfig, trials: Sequence[Trial]) -> None:
    """Check that finished trials have the metric.

    Raises:
        ConfigError: the final pass of a trial does not measure it.
    """
    short = any(trial.config.evaluation.final == "aggregated" for trial in trials)
    if short and sweep.metric.startswith("personalised"):
        raise ConfigError(
            f"metric: {sweep.metric} is not measured with evaluation.final: aggregated; use metric: aggregated_mean, "
            "or evaluation.final: both"
        )


def _check_scheduler(sweep: SweepConfig, trials: Sequence[Trial]) -> None:
    """Check that the scheduler can end trials.

    Raises:
        ConfigError: the scheduler could never end a trial.
    """
    if sweep.scheduler is None:
        return
    shortest = min(trial.config.rounds for trial in trials)
    if sweep.scheduler.grace_rounds >= shortest:
        raise ConfigError(
            f"scheduler.grace_rounds: {sweep.scheduler.grace_rounds}, but a trial has only {shortest} rounds: none "
            "would end early"
        )
    if sweep.metric != "train_loss" and not all(trial.config.evaluation.every for trial in trials):
        raise ConfigError(
            f"scheduler: ends trials by {sweep.metric} of their rounds, but evaluation.every: 0 measures it only at "
            "the end; set evaluation.every, or use metric: train_loss"
        )


def _is_range(values: Any) -> bool:
    return isinstance(values, Mapping) and len(values) == 1 and next(iter(values)) in RANGES


def _grid(path: str, values: Any) -> list[Any]:
    if path != "method" and isinstance(values, Mapping):
        raise ConfigError(f"space.{path}: expected a list of values or one of {choices(RANGES)}, got {values!r}")
    found = list(values) if isinstance(values, list | tuple) else [values]
    if not found:
        raise ConfigError(f"space.{path}: an empty list; name at least one value")
    if twice := [value for i, value in enumerate(found) if value in found[:i]]:
        raise ConfigError(f"space.{path}: {shown(twice[0])} occurs more than once; the trials would be identical")
    return found


def _drawn(path: str, values: Mapping[str, Any], seed: int, sample: int) -> Any:
    """Return a value drawn from a range, keyed by the path and the number of the sample."""
    ((kind, bounds),) = values.items()
    rng = keyed_rng(seed, "sweep", path, sample)
    if kind == "choice":
        options = _grid(path, bounds)
        return options[int(rng.integers(len(options)))]
    low, high = _bounds(path, kind, bounds)
    if kind == "randint":
        return int(rng.integers(low, high))
    if kind == "loguniform":
        return float(np.exp(rng.uniform(np.log(low), np.log(high))))
    return float(rng.uniform(low, high))


def _bounds(path: str, kind: str, bounds: Any) -> tuple[Any, Any]:
    """Return the bounds of a range as (low, high).

    Raises:
        ConfigError: they are not two numbers in order, or not of the type that the kind of range needs.
    """
    numbers = (int,) if kind == "randint" else (int, float)
    fine = isinstance(bounds, list | tuple) and len(bounds) == 2
    fine = fine and all(type(bound) in numbers and np.isfinite(bound) for bound in bounds)
    if not fine or not bounds[0] < bounds[1] or (kind == "loguniform" and bounds[0] <= 0):
        what = "two whole numbers" if kind == "randint" else "two numbers"
        above = "0 < low < high" if kind == "loguniform" else "low < high"
        raise ConfigError(f"space.{path}: {kind} needs [low, high], {what} with {above}, got {bounds!r}")
    return bounds[0], bounds[1]


def _config(base: Config, point: Mapping[str, Any]) -> Config:
    raw, rest = to_mapping(base), dict(point)
    entry = rest.pop("method", raw["method"][0])
    entry = {"name": entry} if isinstance(entry, str) else entry
    raw["method"] = [entry]
    for path in rest:
        section, _, name = path.partition(".")
        if name and isinstance(entry, Mapping) and name in (entry.get(section) or {}):
            raise ConfigError(
                f"space.{path}: the method {shown(entry)} sets {path} itself, which would take precedence; "
                f"remove it there, or sweep method.{path}"
            )
    # The trial's only method is the first one of its configuration.
    overrides = {re.sub(r"^method\.", "method.0.", path): value for path, value in rest.items()}
    try:
        config = load_config(raw, overrides)
        build_method(config, config.method[0])
    except ConfigError as error:
        raise ConfigError(f"space: {readable_point(point)}: {error}") from None
    return config


def readable_point(point: Mapping[str, Any]) -> str:
    """Return a point as text, for example `method=fedavg train.lr=0.001 seed=1`."""
    return " ".join(f"{path}={shown(value)}" for path, value in point.items())


def shown(value: Any) -> str:
    """Return a value of a point as text."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return str(value.get("label") or value.get("name") or value.get("class") or json.dumps(value, sort_keys=True))
    return str(value)
