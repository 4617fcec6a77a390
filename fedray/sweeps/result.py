"""The result of a sweep: how each trial ended, and the trials compared."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from io import BytesIO
from typing import Any, Literal

import numpy as np
import pandas as pd

from fedray.config import Config, SweepConfig, dump_yaml, load_sweep, parse_yaml, to_mapping
from fedray.config.sweep import METRICS, SCORES
from fedray.config.yaml import to_yaml
from fedray.errors import ConfigError, StateError
from fedray.evaluation.metrics import configured_metric
from fedray.experiment.resume import differences
from fedray.results.comparability import data_key
from fedray.results.comparison import Comparison, compare
from fedray.results.run_result import RunResult
from fedray.results.statistics import confidence_interval
from fedray.storage.paths import StoragePath
from fedray.sweeps.space import Trial, trials_of
from fedray.types import Moment

Status = Literal["waiting", "finished", "stopped", "failed", "lost"]


FREE = re.compile(r"name|max_concurrent|base\.report|base\.(callbacks|tracking).*")
"""Fields that may change when a sweep is resumed."""


@dataclass(frozen=True)
class TrialResult:
    """How a trial ended.

    Attributes:
        status: `stopped` if the scheduler ended the trial early; `lost` if its process died, and then the trial runs
            again when the sweep is resumed.
        rounds: number of finished rounds.
        metrics: by name, those of the last round, and those of the whole trial if it finished.
        error: why the trial failed.
        seconds: duration on this cluster.
    """

    id: str
    status: Status
    rounds: int = 0
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    error: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class TrialFinished:
    """A trial ended: the event that `Callback.on_trial_finished` receives."""

    trial: Trial
    result: TrialResult


def more_is_better(sweep: SweepConfig, config: Config) -> bool:
    """Return whether a larger metric is better."""
    if sweep.mode is not None:
        return sweep.mode == "max"
    if sweep.metric not in SCORES:  # losses, bytes, seconds
        return False
    return configured_metric(config).higher_is_better


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep.

    Attributes:
        place: the sweep's folder.
        ended: results of the trials that have ended, by id.
    """

    place: StoragePath
    sweep: SweepConfig
    trials: tuple[Trial, ...]
    ended: Mapping[str, TrialResult]

    @classmethod
    def load(cls, where: Any) -> "SweepResult":
        """Read a sweep from its folder.

        Raises:
            StateError: the folder is not that of a sweep, or one of its files cannot be read.
        """
        place = StoragePath.of(where)
        try:
            sweep = load_sweep(parse_yaml((place / "sweep.yaml").read().decode(), str(place / "sweep.yaml")))
        except (OSError, ValueError, ConfigError) as error:
            raise StateError(f"{place}: is not the folder of a sweep: {error}") from None
        return cls(place, sweep, trials_of(sweep), {}).reread()

    def reread(self) -> "SweepResult":
        """Return this result with the ended trials read again from the folder: another process may have continued the
        sweep.

        Raises:
            StateError: trials.json cannot be read.
        """
        file = self.place / "trials.json"
        try:
            entries = json.loads(file.read()) if file.is_file() else []
            ended = {entry["id"]: TrialResult(**entry) for entry in entries}
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise StateError(f"{file}: cannot be read: {error}") from None
        return replace(self, ended=ended)

    def with_result(self, ended: TrialResult) -> "SweepResult":
        """Return this result with one more trial that has ended."""
        return replace(self, ended={**self.ended, ended.id: ended})

    @property
    def complete(self) -> bool:
        """Whether every trial has ended."""
        return not self.waiting

    @property
    def waiting(self) -> list[Trial]:
        """Trials that still have to run: those that have not ended, and those that were lost."""
        return [one for one in self.trials if one.id not in self.ended or self.ended[one.id].status == "lost"]

    def folder(self, trial: Trial | str) -> StoragePath:
        """Return the folder of a trial's run, which `RunResult.load` reads."""
        return self.place / "trials" / (trial if isinstance(trial, str) else trial.id)

    def to_pandas(self) -> pd.DataFrame:
        """Return one row per trial: its status, method, seed, the space's values, rounds, metrics, error, seconds.

        A trial that the scheduler ended has the metrics of its last round; those of a failed trial are missing.
        """
        table = pd.DataFrame([self._row(trial) for trial in self.trials])
        for path in self.sweep.space:
            if path in table and table[path].map(type).nunique() > 1:
                table[path] = table[path].map(str)
        return table

    def _row(self, trial: Trial) -> dict[str, Any]:
        ended = self.ended.get(trial.id, TrialResult(trial.id, "waiting"))
        values = {path: _cell(value) for path, value in trial.point.items() if path not in ("method", "seed")}
        metrics = {name: ended.metrics.get(name) for name in METRICS}
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
        """Return one row per point without its seed, the best first.

        A row has the number of seeds and how many of them finished, and over these the metric's mean, its standard
        deviation and the 95 % confidence interval of the mean (Student's t), on test examples; and `selection`, the
        mean by which points are ordered, on the examples of `select_on`. Trials that were ended early are left out,
        because their last round is not that of the others. Points whose seeds did not all finish come last, because the
        remaining seeds may be the lucky ones.
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
            values, selection = (_values(of, name) for name in (self.sweep.metric, self.sweep.selects_by))
            low, high = confidence_interval(values)
            row = self._row(members[0])
            spread = values.std(ddof=1) if len(values) > 1 else np.nan
            rows.append(
                {name: row[name] for name in names}
                | {"seeds": len(members), "finished": len(of), "selection": selection.mean(), "mean": values.mean()}
                | {"sd": spread, "low": low, "high": high, "first_trial": of[0].id}
            )
        numbers = ("seeds", "finished", "selection", "mean", "sd", "low", "high", "first_trial")
        table = pd.DataFrame(rows, columns=[*names, *numbers])
        better = -table["selection"] if self._more_is_better() else table["selection"]
        order = pd.DataFrame({"lacks": table["finished"] < table["seeds"], "selection": better})
        return table.loc[order.sort_values(["lacks", "selection"], na_position="last", kind="stable").index]

    def _has_finished(self, trial: Trial) -> bool:
        return trial.id in self.ended and self.ended[trial.id].status == "finished"

    @property
    def best(self) -> Trial | None:
        """The first trial of the best point of `over_seeds`; None if no trial has finished with a number.

        With `select_on: test`, report its value as the best of many.
        """
        table = self.over_seeds().dropna(subset=["selection"])
        if table.empty:
            return None
        return next(trial for trial in self.trials if trial.id == table.iloc[0]["first_trial"])

    def runs(self) -> tuple[RunResult, ...]:
        """Return the finished runs of each method's best point of `over_seeds`, on each data set of the space.

        Raises:
            StateError: the folder of a trial cannot be read.
        """
        by_id = {trial.id: trial for trial in self.trials}
        points: dict[tuple[str, str], str] = {}
        for id in self.over_seeds()["first_trial"]:
            points.setdefault((by_id[id].method, data_key(by_id[id].config)), _without_seed(by_id[id]))
        chosen = set(points.values())
        found = [trial for trial in self.trials if self._has_finished(trial) and _without_seed(trial) in chosen]
        return tuple(RunResult.load(self.folder(trial)) for trial in found)

    @property
    def choice(self) -> str:
        """What `runs` chose from, as a note of a comparison; empty if the sweep varies only methods and seeds."""
        values: dict[str, set[str]] = {}
        for trial in self.trials:
            for path, value in trial.point.items():
                values.setdefault(path, set()).add(json.dumps(value, sort_keys=True))
        varied = [path for path, found in values.items() if len(found) > 1 and path not in ("method", "seed")]
        return (
            f"{self.place}: each method at its best of {', '.join(varied)} by {self.sweep.selects_by}" if varied else ""
        )

    def compare(
        self, *, reference: str | Sequence[str] = (), metric: str | None = None, moment: Moment | None = None
    ) -> Comparison:
        """Return the methods compared over seeds, each at its best point (`runs`).

        Args:
            reference, metric, moment: as for `RunResult.compare`.

        Raises:
            ComparisonError: the runs cannot be compared; the message says why.
        """
        notes = [self.choice] if self.choice else []
        return compare(self.runs(), references=reference, metric=metric, moment=moment, notes=notes)

    def write(self) -> None:
        """Write trials.json (which `load` reads), trials.parquet (`to_pandas`), and best.yaml, which `fedray run`
        accepts."""
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
    """Create the folder of a sweep, with its sweep.yaml."""
    (found.place / "sweep.yaml").write(to_yaml(to_mapping(found.sweep)).encode())


def resumed(place: StoragePath, given: SweepConfig) -> SweepResult:
    """Return a sweep as its folder has it, to continue it.

    Raises:
        StateError: the folder is not that of a sweep.
        ConfigError: the folder is that of another sweep.
    """
    found = SweepResult.load(place)
    lines = differences(found.sweep, given, lambda path: FREE.fullmatch(path) is not None)
    if lines:
        raise ConfigError(
            f"{place}: cannot be continued as another sweep; only base.callbacks, base.report, base.tracking, "
            "max_concurrent, name may differ:\n" + "\n".join(lines)
        )
    return replace(found, sweep=given, trials=trials_of(given))


def _values(of: Sequence[TrialResult], name: str) -> np.ndarray[Any, Any]:
    """Return a metric of some trials; NaN where it is unknown."""
    return np.array([np.nan if (value := one.metrics.get(name)) is None else value for one in of], float)


def _without_seed(trial: Trial) -> str:
    return json.dumps({path: value for path, value in trial.point.items() if path != "seed"}, sort_keys=True)


def _cell(value: Any) -> Any:
    """Return a value as a table's cell: numbers and text as they are, anything else as JSON."""
    return value if isinstance(value, str | int | float) else json.dumps(value, sort_keys=True)
