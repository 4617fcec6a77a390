"""The report of a sweep: its points, its trials that failed, and the methods at their best points."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from fedray.config import to_mapping
from fedray.config.sweep import SCORES
from fedray.config.yaml import to_yaml
from fedray.errors import ConfigError, StateError
from fedray.evaluation.metrics import configured_metric
from fedray.report.build import repeating, report_of
from fedray.report.curves import BANDS
from fedray.report.document import Report, Section
from fedray.report.figure import Axis, Card, Figure, Line, Lines, Listing, array, slug
from fedray.report.files import NAME, write_files
from fedray.report.scores import scale_of
from fedray.report.style import method_styles
from fedray.results.comparison import USUAL_REFERENCES
from fedray.results.report import NONE, readable_metric
from fedray.results.run_result import RunResult
from fedray.results.sheets import Cell, Sheet
from fedray.storage.paths import StoragePath
from fedray.sweeps.compare import opened, opened_runs
from fedray.sweeps.result import SweepResult
from fedray.sweeps.space import shown

POINTS = 50
"""Points that the table lists at most."""
FAILED = 50
"""Trials without a result that are listed at most."""


def write_report(
    *results: RunResult | SweepResult | str | Path | StoragePath,
    output: str | Path | None = None,
    figures: str | Path | None = None,
) -> StoragePath:
    """Write the report of runs and sweeps; runs on one data set are merged by seed, as by `fedray.compare`.

    Args:
        results: runs and sweeps, or their folders; of a sweep, each method at its best point.
        output: the page; default report.html in the folder of the only result.
        figures: a folder for every figure as SVG, PNG and CSV; default none.

    Returns:
        Where the page is.

    Raises:
        ConfigError: a folder is not that of a run or a sweep, or something that is no report would be overwritten.
        FedrayError: a file cannot be read or written.
    """
    found = [opened(one) for one in results]
    if output is None and len(found) != 1:
        raise ConfigError("--output: the report of several results is in none of their folders; name a file")
    place = found[0].place / NAME if output is None else output
    return write_files(lambda: result_report(found), place, figures)


def result_report(found: Sequence[RunResult | SweepResult]) -> Report:
    """Return the report of runs and sweeps.

    Raises:
        StateError: no trial of a sweep has finished, or a file cannot be read.
    """
    runs, notes = opened_runs(found)
    sweeps = [one for one in found if isinstance(one, SweepResult)]
    if not runs:
        raise StateError(f"{found[0].place}: no trial has finished; trials.parquet has the errors")
    sections = [_section(one, number if len(sweeps) > 1 else None) for number, one in enumerate(sweeps)]
    if len(found) == 1 and sweeps:
        sweep, place = sweeps[0].sweep, sweeps[0].place
        texts = repeating(place, "sweep", "sweep.yaml", to_yaml(to_mapping(sweep)))
        return report_of(runs, sweep.name, notes, sections, texts)
    return report_of(runs, notes=notes, more=sections)


def _section(found: SweepResult, number: int | None) -> Section:
    """Return the points of a sweep, and its trials that failed."""
    last = "" if number is None else f"-{number + 1}"
    title = f"Sweep {found.sweep.name}"
    statuses = found.to_pandas()["status"].value_counts()
    notes = [f"{len(found.trials)} trials: {', '.join(f'{count} {status}' for status, count in statuses.items())}."]
    if found.sweep.selects_by == found.sweep.metric and found.sweep.metric in SCORES:
        notes.append("Points are ordered by test scores: the best one is the best of many numbers.")
    if not found.choice:
        notes.append("The sweep varies only methods and seeds, so its points are the methods.")
        return Section(f"sweep{last}", title, listings=_failures(found), notes=tuple(notes))
    cards = tuple(_cards(found, last))
    return Section(f"sweep{last}", title, cards, (_points(found),), _failures(found), notes=tuple(notes))


def _points(found: SweepResult) -> Sheet:
    """Return the points, the best first."""
    table, metric = found.over_seeds(), found.sweep.metric
    paths, selected = _varied(found, table), table["selection"].notna().any()
    score = configured_metric(found.trials[0].config)

    def readable(value: float) -> str:
        if np.isnan(value):
            return NONE
        return readable_metric(value, score) if metric in SCORES else f"{value:.4g}"

    rows = []
    for place, row in enumerate(table.head(POINTS).to_dict("records")):
        interval = NONE if row["finished"] < 2 else f"{readable(row['low'])} to {readable(row['high'])}"
        words = [row["method"], *(shown(row[path]) for path in paths), f"{row['finished']} of {row['seeds']}"]
        numbers = [readable(row["selection"]), readable(row["mean"]), interval, row["first_trial"]]
        cells = [Cell(str(text)) for text in (*words, *numbers)]
        cells[len(words)] = Cell(numbers[0], best=not place and numbers[0] != NONE)
        rows.append(tuple(cells))
    left = f"; the first {POINTS} of {len(table)}" if len(table) > POINTS else ""
    order = ", the best first" if selected else f", not ordered: no trial has {found.sweep.selects_by}"
    columns = ("method", *paths, "seeds", found.sweep.selects_by, f"{metric},\ntest" if metric in SCORES else metric)
    return Sheet(f"Points{order}{left}", (*columns, "95 % interval", "first trial"), tuple(rows))


def _varied(found: SweepResult, table: pd.DataFrame) -> list[str]:
    """Return the fields of the space with several values, apart from the method and the seed."""
    fields = [path for path in found.sweep.space if path not in ("method", "seed")]
    return [path for path in fields if table[path].map(str).nunique() > 1]


def _cards(found: SweepResult, last: str) -> list[Card]:
    """Return the metric over every numeric field of the space that has several values."""
    table = found.over_seeds()
    varied = _varied(found, table)
    methods = list(dict.fromkeys(map(str, table["method"])))
    styles = method_styles(sorted(methods), methods, USUAL_REFERENCES)
    metric, config = found.sweep.metric, found.trials[0].config
    scale = scale_of(configured_metric(config)) if metric in SCORES else 1.0
    cards = []
    for path in varied:
        values = pd.to_numeric(table[path], errors="coerce")
        if values.isna().any() or bool in set(table[path].map(type)):
            continue
        connected = len(varied) == 1
        lines = []
        for method, rows in table.assign(at=values).groupby("method", sort=False):
            rows = rows.sort_values("at")
            banded = len(methods) <= BANDS and connected and rows[["low", "high"]].notna().to_numpy().all()
            edges = [scale * array(rows[name]) for name in ("low", "high")] if banded else []
            lines.append(Line(str(method), styles[str(method)], array(rows["at"]), scale * array(rows["mean"]), *edges))
        log = bool((values > 0).all()) and values.max() >= 10 * values.min()
        figure = Figure(
            f"{slug('sweep', path)}{last}",
            f"{metric} by {path}",
            Axis(path, log),
            Axis(f"{metric}{' (%)' if scale == 100 else ''}, mean over seeds"),
            Lines(tuple(lines), connected),
            "Test scores. Band: 95 % interval over seeds."
            if metric in SCORES
            else "Band: 95 % interval over seeds, where there are several.",
        )
        cards.append(Card.of(figure))
    return cards


def _failures(found: SweepResult) -> tuple[Listing, ...]:
    trials = {trial.id: trial for trial in found.trials}
    ended = [one for one in found.ended.values() if one.status in ("failed", "lost")]
    rows = [(one.id, trials[one.id].method, one.status, str(one.rounds), one.error) for one in ended[:FAILED]]
    if not rows:
        return ()
    left = f" (the first {FAILED} of {len(ended)})" if len(ended) > FAILED else ""
    return (Listing(f"Trials without a result{left}", ("trial", "method", "status", "rounds", "cause"), tuple(rows)),)
