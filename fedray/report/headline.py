"""The headline table: every method's score with its interval, and what it cost."""

import math

import pandas as pd

from fedray.errors import choices
from fedray.report.scores import final_means
from fedray.report.tables import RunTables
from fedray.results.comparison import Comparison, DataSetComparison
from fedray.results.report import NONE, MetricFormat, readable_bytes, readable_count
from fedray.results.sheets import Cell, Sheet


def headline_sheet(tables: RunTables, comparison: Comparison | None, data_set: DataSetComparison | None) -> Sheet:
    """Return one row per method, the best mean first.

    Args:
        comparison: of the methods; None if they cannot be compared, for example because there is only one.
        data_set: of the comparison, the one that the tables are of.
    """
    written, metric, seeds = MetricFormat(tables.metric), tables.metric, len(tables.seeds)
    means = final_means(tables)
    frame = pd.DataFrame([vars(one) for run in tables.runs for one in run.summaries])
    reference = comparison.references[0] if comparison else ""
    found = {one.method: one for one in data_set.against(reference)} if data_set else {}
    figures = {one.method: one for one in data_set.figures} if data_set else {}
    unit = " in %" if metric.percent else ""
    columns = ["method", "head", metric.label + unit]
    columns += ["± of\nseeds"] if seeds > 1 else []
    columns += [f"Δ to {reference}", "95 % interval"] if found else []
    columns += ["worst\nclient", "before local\ntraining", "trainable", "sent", "simulated", "here"]
    rows = []
    order = [*means.index, *(name for name in tables.methods if name not in means.index)]
    for method in order:
        mine = frame[frame["method"] == method]
        mean = means.loc[method, "mean"] if method in means.index else math.nan
        best = bool(len(means)) and method == means.index[0]
        cells = [
            Cell(method),
            Cell(str(mine["head"].iloc[0])),
            Cell(written.score(mean), best),
        ]
        if seeds > 1:
            cells.append(Cell(written.score(figures[method].sd) if method in figures else NONE))
        if found:
            one = found.get(method)
            cells.append(Cell(written.difference(one.delta) if one else NONE))
            cells.append(Cell(written.interval(one.low, one.high) if one else NONE))
        cells += [
            Cell(written.score(_mean(mine["personalised_worst"]))),
            Cell(written.score(_mean(mine["aggregated_mean"]))),
            Cell(readable_count(round(_mean(mine["trainable_parameters"])))),
            Cell(readable_bytes(_mean(mine["uplink_bytes"]) + _mean(mine["downlink_bytes"]))),
            Cell(readable_seconds(_mean(mine["simulated_seconds"]))),
            Cell(readable_seconds(_mean(mine["wall_seconds"]))),
        ]
        rows.append(tuple(cells))
    return Sheet(_title(tables), tuple(columns), tuple(rows), _notes(tables, found != {}))


def _title(tables: RunTables) -> str:
    config = tables.runs[0].config
    seeds = (
        f"{len(tables.seeds)} seeds ({choices(tables.seeds, 10)})" if len(tables.seeds) > 1 else f"seed {config.seed}"
    )
    rounds = f"{config.rounds} round{'s' * (config.rounds > 1)}"
    clients = tables.runs[0].summaries[0].clients
    return f"{tables.metric.label} on each client's own test examples, after {rounds}; {clients:,} clients, {seeds}"


def _notes(tables: RunTables, compared: bool) -> tuple[str, ...]:
    notes = [] if tables.metric.higher_is_better else ["Lower is better."]
    notes.append(
        "Scores are means over clients after their last local training. Sent: up and down, all rounds and clients. "
        "Simulated: on the devices of the tiers. Here: on the machine that ran it, with the final pass."
    )
    if compared:
        notes.append(
            "Δ: mean difference of the same client with the same seed, with the 95 % interval of the bootstrap over "
            + ("seeds and clients." if len(tables.seeds) > 1 else "clients, which says nothing about other seeds.")
        )
    return tuple(notes)


def _mean(values: pd.Series) -> float:
    """Return the mean over runs; NaN if a value is missing."""
    return float(pd.to_numeric(values).astype(float).mean(skipna=False))


def readable_seconds(seconds: float) -> str:
    """Return seconds as `8.1 s`, `12 min`, `3.4 h`."""
    if math.isnan(seconds):
        return NONE
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
