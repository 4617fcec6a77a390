"""The trials of a sweep: which ones there are, what became of them, and what they say together."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from io import BytesIO
from itertools import product
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy import stats

from fedray.config import Config, SweepConfig, dump_yaml, load_config, load_sweep, parse_yaml, to_mapping
from fedray.config.sweep import OF_THE_WHOLE, PER_ROUND
from fedray.config.yaml import to_yaml
from fedray.errors import ConfigError, StateError, choices
from fedray.evaluation.metrics import configured_metric
from fedray.methods.registry import build_method
from fedray.randomness import keyed_rng
from fedray.storage.paths import StoragePath

RANGES = ("uniform", "loguniform", "randint", "choice")

Status = Literal["waiting", "finished", "stopped", "failed", "lost"]

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Trial:
    """One experiment of a sweep, with one method. id: of its folder. point: its values by the space's paths."""

    id: str
    point: Mapping[str, Any]
    config: Config

    @property
    def method(self) -> str:
        return self.config.method[0].key


@dataclass(frozen=True)
class Ended:
    """What became of a trial. status: `stopped`: the scheduler ended it early; `lost`: its process ended, and it runs
    again when the sweep goes on. rounds: how many it had. metrics: by name, as of its last round, and of the whole
    where it is finished. error: why it failed."""

    id: str
    status: Status
    rounds: int = 0
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    error: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class TrialRound:
    """A trial has had another round. metric: of it."""

    id: str
    rounds: int
    metric: float


@dataclass(frozen=True)
class TrialEnded:
    trial: Trial
    ended: Ended


SweepEvent = TrialRound | TrialEnded


def trials_of(sweep: SweepConfig) -> tuple[Trial, ...]:
    """Return a sweep's trials, each checked as far as its text goes.

    The draws from ranges are the same for every point of the grid, so that methods and seeds are compared on equal
    values. A base with several methods is a grid over them.

    Raises:
        ConfigError: the base or a value does not fit; a path that there is not; an empty grid, a range upside down.
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
            points.setdefault(json.dumps(point, sort_keys=True), point)  # draws from few values repeat themselves
    digits = max(4, len(str(len(points))))
    trials = tuple(Trial(f"{i:0{digits}d}", point, _config(base, point)) for i, point in enumerate(points.values()))
    _check_scheduler(sweep, trials)
    return trials


def _check_scheduler(sweep: SweepConfig, trials: Sequence[Trial]) -> None:
    """Raises:
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
            "the end; set evaluation.every, or metric: train_loss"
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
        raise ConfigError(f"space.{path}: {shown(twice[0])} occurs more than once; it would be the same trial again")
    return found


def _drawn(path: str, values: Mapping[str, Any], seed: int, sample: int) -> Any:
    """Return a draw, keyed by the path and the number of the sample."""
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
    """Return (low, high). Raises ConfigError."""
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
                f"space.{path}: the method {shown(entry)} has a value of its own for {path}, which would "
                f"win; leave it out there, or sweep method.{path}"
            )
    # The trial's only method is its configuration's first.
    overrides = {re.sub(r"^method\.", "method.0.", path): value for path, value in rest.items()}
    try:
        config = load_config(raw, overrides)
        build_method(config, config.method[0])
    except ConfigError as error:
        raise ConfigError(f"space: {readable_point(point)}: {error}") from None
    return config


def readable_point(point: Mapping[str, Any]) -> str:
    """Return `method=fedavg train.lr=0.001 seed=1`."""
    return " ".join(f"{path}={shown(value)}" for path, value in point.items())


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return str(value.get("label") or value.get("name") or value.get("class") or json.dumps(value, sort_keys=True))
    return str(value)


def more_is_better(sweep: SweepConfig, config: Config) -> bool:
    """Return whether a larger metric is better."""
    if sweep.mode is not None:
        return sweep.mode == "max"
    if not sweep.metric.startswith(("personalised", "aggregated")):  # losses, bytes, seconds
        return False
    return configured_metric(config.evaluation, config.task).higher_is_better


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found. place: its folder. ended: of the trials that have ended, by id."""

    place: StoragePath
    sweep: SweepConfig
    trials: tuple[Trial, ...]
    ended: Mapping[str, Ended]

    @classmethod
    def load(cls, where: Any) -> "SweepResult":
        """Read a sweep from its folder.

        Raises:
            StateError: it is not the folder of a sweep, or a file of it cannot be read.
        """
        place = StoragePath.of(where)
        try:
            sweep = load_sweep(parse_yaml((place / "sweep.yaml").read().decode(), str(place / "sweep.yaml")))
        except (OSError, ValueError, ConfigError) as error:
            raise StateError(f"{place}: is not the folder of a sweep: {error}") from None
        return cls(place, sweep, trials_of(sweep), {}).reread()

    def reread(self) -> "SweepResult":
        """Return it with what its folder says has ended: another process may have gone on with it.

        Raises:
            StateError: trials.json cannot be read.
        """
        file = self.place / "trials.json"
        try:
            entries = json.loads(file.read()) if file.is_file() else []
            ended = {entry["id"]: Ended(**entry) for entry in entries}
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise StateError(f"{file}: cannot be read: {error}") from None
        return replace(self, ended=ended)

    def with_ended(self, ended: Ended) -> "SweepResult":
        return replace(self, ended={**self.ended, ended.id: ended})

    @property
    def complete(self) -> bool:
        """Whether every trial has ended."""
        return not self.waiting

    @property
    def waiting(self) -> list[Trial]:
        """Trials that are to be run: those that have not ended, and those that were lost."""
        return [one for one in self.trials if one.id not in self.ended or self.ended[one.id].status == "lost"]

    def folder(self, trial: Trial | str) -> StoragePath:
        """Return the folder of a trial's run, which `RunResult.load` reads."""
        return self.place / "trials" / (trial if isinstance(trial, str) else trial.id)

    def to_pandas(self) -> pd.DataFrame:
        """Return one row per trial: its status, method, seed, the space's values, rounds, metrics, error, seconds.

        Metrics are those of the last round where the scheduler ended a trial, and missing where it failed.
        """
        table = pd.DataFrame([self._row(trial) for trial in self.trials])
        for path in self.sweep.space:
            if path in table and table[path].map(type).nunique() > 1:
                table[path] = table[path].map(str)
        return table

    def _row(self, trial: Trial) -> dict[str, Any]:
        ended = self.ended.get(trial.id, Ended(trial.id, "waiting"))
        values = {path: _cell(value) for path, value in trial.point.items() if path not in ("method", "seed")}
        metrics = {name: ended.metrics.get(name) for name in (*PER_ROUND, *OF_THE_WHOLE)}
        numbers = {name: np.nan if value is None else float(value) for name, value in metrics.items()}
        return {
            "trial": trial.id,
            "status": ended.status,
            "method": trial.method,
            "seed": trial.config.seed,
            **values,
            "rounds_done": ended.rounds,
            **numbers,
            "seconds": ended.seconds,
            "error": ended.error,
        }

    def over_seeds(self) -> pd.DataFrame:
        """Return one row per point without its seed, the best first: of how many seeds how many finished, the metric's
        mean over these, its standard deviation and the 95 % confidence interval of the mean (Student's t).

        Trials that were ended early are left out: their last round is not the others'. So points of which not all seeds
        finished come last: the seeds that are left may be the lucky ones.
        """
        names = ["method", *(path for path in self.sweep.space if path not in ("method", "seed"))]
        groups: dict[str, list[Trial]] = {}
        for trial in self.trials:
            groups.setdefault(_without_seed(trial), []).append(trial)
        rows = []
        for members in groups.values():
            of = [self.ended[trial.id] for trial in members if self._has_finished(trial)]
            if not of:
                continue
            values = np.array([np.nan if (v := one.metrics.get(self.sweep.metric)) is None else v for one in of], float)
            low, high = confidence_interval(values)
            row = self._row(members[0])
            spread = values.std(ddof=1) if len(values) > 1 else np.nan
            rows.append(
                {name: row[name] for name in names}
                | {"seeds": len(members), "finished": len(of), "mean": values.mean(), "sd": spread}
                | {"low": low, "high": high, "first_trial": of[0].id}
            )
        table = pd.DataFrame(rows, columns=[*names, "seeds", "finished", "mean", "sd", "low", "high", "first_trial"])
        better = -table["mean"] if self._more_is_better() else table["mean"]
        order = pd.DataFrame({"lacks": table["finished"] < table["seeds"], "mean": better})
        return table.loc[order.sort_values(["lacks", "mean"], na_position="last", kind="stable").index]

    def _has_finished(self, trial: Trial) -> bool:
        return trial.id in self.ended and self.ended[trial.id].status == "finished"

    @property
    def best(self) -> Trial | None:
        """The first trial of the point that `over_seeds` has first; None where no trial has finished with a number.

        It is chosen by the metric, which is measured on test examples: report its value as chosen among many.
        """
        table = self.over_seeds().dropna(subset=["mean"])
        if table.empty:
            return None
        return next(trial for trial in self.trials if trial.id == table.iloc[0]["first_trial"])

    def write(self) -> None:
        """Write trials.json (all that `load` needs), trials.parquet (`to_pandas`) and best.yaml, ready for
        `fedray run`."""
        entries = [asdict(self.ended[trial.id]) for trial in self.trials if trial.id in self.ended]
        (self.place / "trials.json").write((json.dumps(entries, indent=1) + "\n").encode())
        buffer = BytesIO()
        self.to_pandas().to_parquet(buffer)
        (self.place / "trials.parquet").write(buffer.getvalue())
        if (best := self.best) is not None:
            (self.place / "best.yaml").write(dump_yaml(best.config).encode())

    def _more_is_better(self) -> bool:
        return more_is_better(self.sweep, self.trials[0].config)


def begin(found: SweepResult) -> None:
    """Make the folder of a new sweep."""
    (found.place / "sweep.yaml").write(to_yaml(to_mapping(found.sweep)).encode())


def resumed(place: StoragePath, given: SweepConfig) -> SweepResult:
    """Return what a sweep has reached.

    Raises:
        StateError: it is not a sweep's folder. ConfigError: it is that of another sweep.
    """
    found = SweepResult.load(place)
    free = {"name", "max_concurrent"}
    ours, theirs = to_mapping(found.sweep), to_mapping(given)
    differing = sorted(name for name in ours if name not in free and ours[name] != theirs[name])
    if differing:
        raise ConfigError(
            f"{place}: cannot be continued as another sweep; only {choices(sorted(free))} may differ, but these do: "
            f"{choices(differing)}"
        )
    return replace(found, sweep=given)


def confidence_interval(values: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Return the 95 % confidence interval of the mean of independent, normal values (Student's t); NaN for fewer than
    two. [n]"""
    if len(values) < 2:
        return float("nan"), float("nan")
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def _without_seed(trial: Trial) -> str:
    return json.dumps({path: value for path, value in trial.point.items() if path != "seed"}, sort_keys=True)


def _cell(value: Any) -> Any:
    """Return a value as it stands in a table's column: numbers and text as they are, the rest as JSON."""
    return value if isinstance(value, str | int | float) else json.dumps(value, sort_keys=True)
