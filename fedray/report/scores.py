"""Figures of the scores after the last round: differences with intervals, score against cost, the clients."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from fedray.config import Metric
from fedray.report.figure import (
    BYTES,
    COUNTS,
    SECONDS,
    Axis,
    Box,
    Boxes,
    Card,
    Figure,
    Intervals,
    Line,
    Lines,
    Listing,
    array,
    slug,
    unit_of,
)
from fedray.report.tables import RunTables
from fedray.results.comparison import Comparison, DataSetComparison
from fedray.results.report import MetricFormat

MARKED = 3
"""Clients with the worst scores that are marked."""
WORST_LISTED = 20
"""Methods whose worst clients are listed."""
MOMENTS = {"personalised": "after local training", "aggregated": "before local training"}
Styles = Mapping[str, int | None]


def scale_of(metric: Metric) -> float:
    """Return what scores are multiplied with."""
    return 100.0 if metric.percent else 1.0


def score_axis(metric: Metric) -> str:
    """Return the title of an axis of scores."""
    better = "higher is better" if metric.higher_is_better else "lower is better"
    return f"{metric.label} ({'%, ' if metric.percent else ''}{better})"


def final_means(tables: RunTables, moment: str = "personalised") -> pd.DataFrame:
    """Return per method the mean over runs of the mean over clients, and the least and largest run: columns mean, low
    and high, the best method first."""
    per_run = tables.final.groupby(["method", "run"], sort=False)[moment].mean().groupby("method", sort=False)
    table = pd.DataFrame({"mean": per_run.mean(), "low": per_run.min(), "high": per_run.max()}).dropna()
    return table.sort_values("mean", ascending=not tables.metric.higher_is_better, kind="stable")


def difference_card(comparison: Comparison, data_set: DataSetComparison) -> Card:
    """Return the differences to every reference, the best first."""
    scale, metric = scale_of(comparison.metric), comparison.metric
    unit = "percentage points" if metric.percent else metric.label
    seeds = len(data_set.seeds)
    drawn = "clients" if seeds == 1 else "seeds and clients"
    views = {}
    for reference in comparison.references:
        found = sorted(
            data_set.against(reference), key=lambda one: one.delta, reverse=comparison.metric.higher_is_better
        )
        marks = Intervals(
            tuple(one.method for one in found),
            *(scale * array([getattr(one, name) for one in found]) for name in ("delta", "low", "high")),
        )
        views[f"to {reference}"] = Figure(
            slug("difference-to", reference),
            f"Difference to {reference}, client by client",
            Axis(f"difference in {metric.label} to {reference} ({unit})"),
            Axis("method"),
            marks,
            f"Mean over {drawn} with the 95 % interval of the bootstrap over {drawn}. "
            + ("Higher is better." if metric.higher_is_better else "Lower is better."),
        )
    return Card("Differences to a reference", views)


def cost_card(tables: RunTables, styles: Styles) -> Card:
    """Return every method's score against what it costs."""
    means, scale = final_means(tables), scale_of(tables.metric)
    summaries = [(run, summary) for run in tables.runs for summary in run.summaries]
    costs = pd.DataFrame(
        {
            "method": [summary.method for _, summary in summaries],
            "sent": [float(summary.uplink_bytes + summary.downlink_bytes) for _, summary in summaries],
            "time": [summary.simulated_seconds for _, summary in summaries],
            "trainable": [float(summary.trainable_parameters) for _, summary in summaries],
        }
    )
    by_method = costs.groupby("method").mean().reindex(means.index)
    views = {}
    for view, column, what, units in (
        ("bytes sent", "sent", "sent in all rounds, up and down", BYTES),
        ("time", "time", "simulated duration of all rounds", SECONDS),
        (
            "parameters",
            "trainable",
            "trainable parameters of a client",
            COUNTS,
        ),
    ):
        size, unit = unit_of(by_method[column].to_numpy(), units)
        values = by_method[column] / size
        log = bool((values > 0).all()) and values.max() > 30 * values.min()
        lines = [
            Line(method, styles.get(method), array([values[method]]), scale * array([means.loc[method, "mean"]]))
            for method in means.index
        ]
        views[view] = Figure(
            f"score-by-{column}",
            f"Score against {view}",
            Axis(f"{what}{f' ({unit})' if unit else ''}", log),
            Axis(score_axis(tables.metric)),
            Lines(tuple(lines), connected=False),
            "One point per method: the mean score after local training, after the last round.",
        )
    return Card("Score against cost", views)


def clients_card(tables: RunTables) -> Card | None:
    """Return how the clients' scores are distributed; None if none was measured."""
    views = {}
    for moment, when in MOMENTS.items():
        boxes = _boxes(tables, moment)
        if boxes:
            views[when] = Figure(
                f"clients-{moment}",
                f"Scores of the clients {when}",
                Axis(f"{score_axis(tables.metric)} of a client"),
                Axis("method"),
                Boxes(tuple(boxes), "worst clients"),
                f"Box: quartiles and median over clients; line: all clients; the {MARKED} worst of each method are "
                "marked, and named where the pointer is. The best mean is on top.",
            )
    return Card("Distribution over clients", views) if views else None


def _boxes(tables: RunTables, moment: str) -> list[Box]:
    scale, found = scale_of(tables.metric), []
    for method in final_means(tables, moment).index:
        rows = tables.final[tables.final["method"] == method].dropna(subset=[moment])
        values = scale * rows[moment].to_numpy()
        lowest, q1, median, q3, highest = np.quantile(values, [0, 0.25, 0.5, 0.75, 1])
        marked = {name: scale * value for name, value in worst_clients(tables, rows, moment)}
        found.append(Box(str(method), lowest, q1, median, q3, highest, values.mean(), marked))
    return found


def worst_clients(tables: RunTables, rows: pd.DataFrame, moment: str) -> list[tuple[str, float]]:
    """Return the names and scores of the clients with the worst scores, the worst first.

    Args:
        rows: of the final pass, of one method.
    """
    worst = rows.sort_values([moment, "client"], ascending=[tables.metric.higher_is_better, True]).head(MARKED)
    several = len(tables.runs) > 1

    def name(row: Mapping[Any, Any]) -> str:
        run = tables.runs[row["run"]]
        return f"{row['client']} (seed {run.config.seed})" if several else str(row["client"])

    return [(name(row), row[moment]) for row in worst.to_dict("records")]


def worst_listing(tables: RunTables, methods: Sequence[str]) -> Listing:
    """Return the worst clients of each method by name."""
    written = MetricFormat(tables.metric)
    rows = []
    for method in list(methods)[:WORST_LISTED]:
        mine = tables.final[tables.final["method"] == method].dropna(subset=["personalised"])
        found = [f"{name}: {written.score(value)}" for name, value in worst_clients(tables, mine, "personalised")]
        rows.append((method, *found, *[""] * (MARKED - len(found))))
    unit = " in %" if tables.metric.percent else ""
    left = f" of the best {WORST_LISTED} methods" if len(methods) > WORST_LISTED else ""
    return Listing(
        f"Worst clients{left}: {tables.metric.label}{unit} after local training",
        ("method", *("worst", "second", "third")[:MARKED]),
        tuple(rows),
    )
