"""Numbers that papers print, beside those of runs."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

import numpy as np
import pandas as pd
from pydantic import ValidationError, model_validator

from fedray.config import Metric, Section, describe, parse_yaml
from fedray.errors import ComparisonError, ConfigError, choices, nearest
from fedray.evaluation.metrics import configured_metrics
from fedray.results.report import NONE, MetricFormat
from fedray.results.run_result import RunResult
from fedray.results.sheets import Cell, Sheet

Measured = Literal["aggregated", "personalised", "server"]


class PublishedColumn(Section):
    """Where a run has the numbers of a column."""

    run: str | None = None
    """Name of the experiment; default the kit's."""
    group: str = ""
    """Test set or task; default all examples together."""
    mean_of: tuple[str, ...] = ()
    """The column is the mean of these columns instead."""


class PublishedTable(Section):
    """Numbers of one paper that were measured in the same way."""

    source: str
    """Where they stand."""
    metric: str
    """Label of the metric. The numbers are in percent where fedray's tables are."""
    moment: Measured | None
    """When the models were measured; null where the paper does not say."""
    round: Literal["last", "best"] = "last"
    """`best` is chosen by the very examples that are reported."""
    weights: Literal["uniform", "examples"] = "uniform"
    """What a client counts for in the mean over clients: `examples` are those that it is measured on."""
    examples: Literal["test", "common"] = "test"
    """Whose examples they were measured on."""
    not_comparable: str | None = None
    """Why a difference would mean nothing."""
    columns: dict[str, PublishedColumn]
    """By the paper's name."""
    values: dict[str, dict[str, float]]
    """By label of the method and column."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        named = [name for row in self.values.values() for name in row]
        named += [name for column in self.columns.values() for name in column.mean_of]
        for name in named:
            if name not in self.columns:
                raise ValueError(f"columns: no {name!r}{nearest(name, self.columns)}; it has {choices(self.columns)}")
        if self.moment is None and self.not_comparable is None:
            raise ValueError("not_comparable: needed where the moment is not known")
        return self

    @property
    def moments(self) -> tuple[str, ...]:
        """The moments of which numbers are shown."""
        return (self.moment,) if self.moment else ("aggregated", "personalised")


Kits = dict[str, tuple[PublishedTable, ...]]
"""Published tables by kit."""


def load_published(path: str | Path) -> Kits:
    """Read a file of published numbers: `kits`, a list of tables by kit.

    Raises:
        ConfigError: it cannot be read, or has mistakes; the message names each with what is allowed.
    """
    try:
        raw = parse_yaml(Path(path).read_text("utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if not isinstance(raw, dict) or set(raw) != {"kits"} or not isinstance(raw["kits"], dict):
        raise ConfigError(f"{path}: expected `kits`, with a list of tables by kit, as in jobs/papers/published.yaml")
    kits: Kits = {}
    mistakes: list[str] = []
    for kit, tables in raw["kits"].items():
        if not isinstance(tables, list):
            raise ConfigError(f"{path}: kits.{kit}: expected a list of tables, got {type(tables).__name__}")
        for number, table in enumerate(tables):
            try:
                kits[kit] = (*kits.get(kit, ()), PublishedTable.model_validate(table))
            except ValidationError as error:
                mistakes += (f"{path}: kits.{kit}.{number}.{line}" for line in describe(error, PublishedTable))
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return kits


def beside_published(
    runs: Sequence[RunResult], published: Kits, methods: Sequence[str] = (), seeds: Sequence[int] = ()
) -> list[Sheet]:
    """Return a table for each of a kit's tables that has numbers of one of these experiments: what the paper prints,
    what the runs have at the same moment (mean over clients by the table's weights, then over seeds), and the
    difference.

    Args:
        methods, seeds: only these; default all.

    Raises:
        ComparisonError: there are no numbers of any of these experiments, methods or seeds.
        StateError: a table of a run cannot be read.
    """
    chosen = [run for run in runs if not seeds or run.config.seed in seeds]
    names = {run.config.name for run in chosen}
    found = []
    for kit, tables in published.items():
        for table in tables:
            kept = {method: row for method, row in table.values.items() if not methods or method in methods}
            if kept and any((column.run or kit) in names for column in table.columns.values() if not column.mean_of):
                found.append(_sheet(kit, table.model_copy(update={"values": kept}), chosen))
    if not found:
        raise ComparisonError(
            f"published: there are no numbers of the experiment {choices(sorted(names)) or 'of these seeds'}"
            f"{' by ' + choices(methods) if methods else ''}; there are kits {choices(published)}"
        )
    return found


def _sheet(kit: str, table: PublishedTable, runs: Sequence[RunResult]) -> Sheet:
    ours = _Ours(kit, table, runs)
    rows = [
        (method, column, f"{value:g}", ours.shown(method, column), ours.difference(method, column, value))
        for method, row in table.values.items()
        for column, value in row.items()
    ]
    moment = table.moment or "moment not published"
    best = ", best round by the reported examples" if table.round == "best" else ""
    weighted = ", clients weighted by examples" if table.weights == "examples" else ""
    return Sheet(
        f"{kit}: {table.metric}, {moment}{weighted}{best}",
        ("method", "column", "published", "ours", "difference"),
        tuple(tuple(Cell(text) for text in cells) for cells in rows),
        (f"published: {table.source}",)
        + ((f"ours: {' / '.join(table.moments)}",) if len(table.moments) > 1 else ())
        + ((f"not comparable: {table.not_comparable}",) if table.not_comparable else ()),
    )


class _Ours:
    """The numbers of runs in the places of a published table."""

    def __init__(self, kit: str, table: PublishedTable, runs: Sequence[RunResult]):
        self._kit, self._table = kit, table
        self._runs = {
            name: [run for run in runs if run.config.name == name] for name in {run.config.name for run in runs}
        }
        self._metric = next((found for run in runs if (found := _metric(run, table.metric))), None)

    def shown(self, method: str, column: str) -> str:
        """Return our number as text; of several moments, all."""
        if self._metric is None:
            return NONE
        write = MetricFormat(self._metric).score
        return " / ".join(write(self.value(method, column, moment)) for moment in self._table.moments)

    def difference(self, method: str, column: str, published: float) -> str:
        """Return ours minus the published number, or why there is none."""
        if self._table.not_comparable:
            return "not comparable"
        if self._metric is None:
            return "not measured"
        scale = 100 if self._metric.percent else 1
        (moment,) = self._table.moments
        return MetricFormat(self._metric).difference(self.value(method, column, moment) - published / scale)

    def value(self, method: str, column: str, moment: str) -> float:
        """Return the mean over clients, then over seeds; NaN where it was not measured."""
        place = self._table.columns[column]
        if place.mean_of:
            return float(np.mean([self.value(method, part, moment) for part in place.mean_of]))
        found = [self._of_run(run, method, place.group, moment) for run in self._runs.get(place.run or self._kit, [])]
        return float(np.mean(found)) if found else math.nan

    def _of_run(self, run: RunResult, method: str, group: str, moment: str) -> float:
        table = self._table
        keys = {"method": method, "group": group, "moment": moment, "metric": table.metric, "examples": table.examples}
        rows = run.evaluations()
        rows = rows[np.logical_and.reduce([rows[key] == value for key, value in keys.items()])]
        rows = rows[rows["phase"] == ("final" if table.round == "last" else "train")]
        if rows.empty:
            return math.nan
        weights = "num_examples" if table.weights == "examples" else None
        means = pd.Series([_mean(found, weights) for _, found in rows.groupby("server_round")])
        higher = self._metric is None or self._metric.higher_is_better
        return float(means.max() if higher else means.min())


def _mean(rows: pd.DataFrame, weights: str | None) -> float:
    """Return the mean value, weighted by a column if one is named."""
    return float(np.average(rows["value"], weights=None if weights is None else rows[weights]))


def _metric(run: RunResult, label: str) -> Metric | None:
    return next((metric for metric in configured_metrics(run.config) if metric.label == label), None)


def csv(tables: Sequence[Sheet]) -> str:
    """Return the tables as one CSV: the title of a row's table is in the column `table`, its notes in `notes`."""
    rows = [
        {"table": sheet.title, **dict(zip(sheet.columns, cells, strict=True)), "notes": "; ".join(sheet.notes)}
        for sheet in tables
        for cells in ([cell.text for cell in row] for row in sheet.rows)
    ]
    return str(pd.DataFrame(rows).to_csv(index=False))
