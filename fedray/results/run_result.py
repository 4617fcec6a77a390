"""The result of a run, read from its folder."""

import json
from collections.abc import Collection, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pandas as pd

from fedray.config import Config, load_config, parse_yaml
from fedray.errors import ConfigError, StateError
from fedray.federation.summary import Summary
from fedray.storage.paths import StoragePath
from fedray.storage.tables import read_table
from fedray.types import Moment

if TYPE_CHECKING:
    from fedray.results.comparison import Comparison


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        place: the run's folder.
        summaries: one per method, in the configuration's order.
    """

    place: StoragePath
    summaries: tuple[Summary, ...]

    @classmethod
    def load(cls, where: str | Path | StoragePath) -> "RunResult":
        """Read the result of an earlier run from its folder, a path or a URI.

        Raises:
            StateError: no method of the run is finished, or the summary cannot be read.
        """
        place = StoragePath.of(where)
        summaries = tuple(read_summaries(place))
        if not summaries:
            raise StateError(f"{place}: has no summary.json: no method has finished")
        return cls(place, summaries)

    @property
    def path(self) -> Path:
        """The run's folder on this machine.

        Raises:
            ValueError: the folder is not on this machine.
        """
        return self.place.local

    @cached_property
    def config(self) -> Config:
        """The run's configuration.

        Raises:
            ConfigError: the folder has none, or it cannot be read.
        """
        return read_config(self.place)

    def __getitem__(self, method: str) -> Summary:
        """Return one method's summary.

        Raises:
            KeyError: the run has no such method; the message lists those that it has.
        """
        found = {summary.method: summary for summary in self.summaries}
        if method not in found:
            raise KeyError(f"no method {method!r}; this run has {', '.join(found)}")
        return found[method]

    def to_pandas(self) -> pd.DataFrame:
        """Return the summaries, one row per method."""
        return pd.DataFrame([vars(summary) for summary in self.summaries])

    def compare(
        self,
        *others: "RunResult",
        reference: str | Sequence[str] = (),
        metric: str | None = None,
        moment: Moment | None = None,
    ) -> "Comparison":
        """Return the run's methods compared, over the seeds of this and of other runs.

        Args:
            others: runs with other seeds, methods or data sets.
            reference: methods that the others are compared with; default `local` and `fedavg`.
            metric: label of a metric that all runs have; default their first one.
            moment: when clients are measured in the final pass: `personalised`, after local training, or `aggregated`,
                before it. Default: `personalised` where all runs have it (`evaluation.final`).

        Raises:
            ComparisonError: the runs cannot be compared; the message says why.
        """
        from fedray.results.comparison import compare

        return compare((self, *others), references=reference, metric=metric, moment=moment)

    def rounds(self) -> pd.DataFrame:
        """Return rounds.parquet: one row per method and round.

        Raises:
            StateError: the file is missing or cannot be read.
        """
        return self._table("rounds")

    def clients(self, columns: Collection[str] | None = None) -> pd.DataFrame:
        """Return clients.parquet: one row per method, round and client.

        Args:
            columns: read only these, where the file has them; default all.

        Raises:
            StateError: the file is missing or cannot be read.
        """
        return self._table("clients", columns=columns)

    def evaluations(self) -> pd.DataFrame:
        """Return evaluations.parquet: one row per method, round, client, moment, examples, group of examples and
        metric. `examples` is `test`, `validation` or `common`; `group` is empty for all of them together; the client of
        the server's own model (moment `server`) is missing.

        Raises:
            StateError: the file is missing or cannot be read.
        """
        return self._table("evaluations")

    def scores(self) -> pd.DataFrame:
        """Return what the final pass measured, one row per method, moment, examples, group of examples and metric: the
        mean over clients, and their number. A mean with an undefined score is NaN.

        Raises:
            StateError: the file cannot be read.
        """
        evaluations = self._table("evaluations", needed=False)
        if evaluations.empty:  # no client has examples to evaluate, or the run is one of a former version
            return pd.DataFrame(columns=["method", "moment", "examples", "group", "metric", "mean", "clients"])
        final = evaluations.query("phase == 'final'")
        keys = ["method", "moment", "examples", "group", "metric"]
        by = final.groupby(keys, sort=False)["value"]
        return by.agg(mean=lambda values: values.to_numpy().mean(), clients="size").reset_index()

    def examples(self) -> pd.DataFrame:
        """Return examples.parquet: one row per method, client, moment and example of the final pass, with its loss, the
        metrics that one example has, and what was predicted (the index of a class, or a number) or generated.

        Raises:
            StateError: the file is missing (`evaluation.examples` writes it) or cannot be read.
        """
        return self._table("examples")

    def best_rounds(
        self,
        moment: Moment = "personalised",
        select_on: Literal["validation", "test"] = "validation",
        higher_is_better: bool = True,
    ) -> pd.DataFrame:
        """Return each method's best evaluated round: the earliest with the best mean over clients on the validation
        examples, and its mean on the test examples. Columns: method, server_round, validation, test.

        Args:
            select_on: `test` selects by the test examples themselves, as some papers do: it reports the best of many
                numbers, which is above what the selected model has on new examples.
            higher_is_better: of the metric.

        Raises:
            StateError: no round was evaluated on the examples that select.
        """
        table = self.rounds().query("phase == 'train'")
        columns = {"validation": f"validation_{moment}_mean", "test": f"{moment}_mean"}
        if columns[select_on] not in table or (known := table.dropna(subset=[columns[select_on]])).empty:
            raise StateError(
                f"{self.place}: no round was evaluated on {select_on} examples; set evaluation.every, and "
                "partition.validation_fraction for validation examples"
            )
        scores = known[columns[select_on]] * (1 if higher_is_better else -1)
        best = scores.groupby(known["method"], sort=False).idxmax()
        found = known.loc[best, ["method", "server_round", columns["validation"], columns["test"]]]
        return found.set_axis(["method", "server_round", *columns], axis=1).reset_index(drop=True)

    def memory(self) -> pd.DataFrame:
        """Return memory.parquet: one row per method and tier.

        Raises:
            StateError: the file is missing or cannot be read.
        """
        return self._table("memory")

    def events(self) -> pd.DataFrame:
        """Return events.parquet, the event log: one row per failed attempt, and for what else went wrong.

        Raises:
            StateError: the file cannot be read.
        """
        return self._table("events", needed=False)

    def _table(self, name: str, needed: bool = True, columns: Collection[str] | None = None) -> pd.DataFrame:
        table = read_table(self.place, name, lambda column: columns is None or column in columns)
        if needed and not table.num_columns:
            raise StateError(f"{self.place / f'{name}.parquet'}: does not exist")
        frame: pd.DataFrame = table.to_pandas()
        return frame


def read_config(place: StoragePath) -> Config:
    """Return the configuration in a run's folder.

    Raises:
        ConfigError: the folder is not that of a run, or its configuration cannot be read.
    """
    file = place / "config.yaml"
    try:
        text = file.read().decode("utf-8") if file.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None
    if text is None:
        raise ConfigError(f"{place}: is not the folder of a run: it has no config.yaml")
    return load_config(parse_yaml(text, str(file)))


def read_summaries(place: StoragePath) -> list[Summary]:
    """Return the summaries of the methods that a run has finished.

    Raises:
        StateError: summary.json cannot be read.
    """
    file = place / "summary.json"
    if not file.is_file():
        return []
    names = [field.name for field in fields(Summary)]
    needed = {field.name for field in fields(Summary) if field.default is MISSING}
    try:
        entries = json.loads(file.read())
        return [
            Summary(**{name: entry[name] for name in names if name in entry or name in needed}) for entry in entries
        ]
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise StateError(f"{file}: is not a summary of a run: {type(error).__name__}: {error}") from None
