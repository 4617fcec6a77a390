"""The table of what the final pass measured besides the first metric on test examples: further metrics, named test
sets, and the common test set."""

from collections.abc import Mapping, Sequence

import pandas as pd
from rich.markup import escape
from rich.table import Table

from fedray.config import Metric
from fedray.results.report import plain_table, readable_metric
from fedray.types import Evaluation

SHOWN_ROWS = 60
"""Rows of the table at most."""

SHOWN_GROUPS = 8
"""Sets with more tasks than this are shown as a whole only; their tasks are in evaluations.parquet."""

MOMENTS = ("server", "aggregated", "personalised")


def further_scores(scores: pd.DataFrame, metrics: Sequence[Metric]) -> Table | None:
    """Return the table, or None if there is nothing that the table of methods does not show.

    Args:
        scores: `RunResult.scores()`.
        metrics: the configured ones; the first is in the table of methods.
    """
    by_label = {metric.label: metric for metric in metrics}
    shown = scores[scores["metric"].isin(by_label) & (scores["examples"] != "validation")]
    groups = shown[shown["group"] != ""].groupby("examples")["group"].nunique()
    many = shown["examples"].isin(groups.index[groups > SHOWN_GROUPS])
    shown = shown[~many | (shown["group"] == "")]
    known = (shown["examples"] == "test") & (shown["group"] == "") & (shown["metric"] == metrics[0].label)
    if known.all():
        return None
    means: dict[tuple[str, ...], dict[str, float]] = {}
    for row in shown[~known].to_dict("records"):
        means.setdefault((row["method"], row["examples"], row["group"], row["metric"]), {})[row["moment"]] = row["mean"]
    moments = [moment for moment in MOMENTS if (shown["moment"] == moment).any()]
    left = f", {len(means) - SHOWN_ROWS} more in evaluations.parquet" if len(means) > SHOWN_ROWS else ""
    title = f"means over clients after the last round{left}"
    table = plain_table(title, ("method", "examples", "set", "metric"), moments)
    methods = list(dict.fromkeys(method for method, *_ in means))
    ordered = sorted(means, key=lambda row: (methods.index(row[0]), row[1] != "test", row[2]))
    for method, examples, group, label in ordered[:SHOWN_ROWS]:
        by_moment = means[method, examples, group, label]
        values = [readable_metric(by_moment.get(moment), by_label[label]) for moment in moments]
        table.add_row(*map(escape, (method, examples, group or "all", label)), *values)
    return table


def client_scores(client: str, evaluations: Mapping[str, Mapping[str, Evaluation]], metrics: Sequence[Metric]) -> Table:
    """Return the table of what one client measured, before and after its local training.

    Args:
        evaluations: by moment and by the name of the examples (`ClientReport.evaluations`).
        metrics: the configured ones.
    """
    table = plain_table(f"client {client}", ("model", "examples", "number"), [*(m.label for m in metrics), "loss"])
    words = {"aggregated": "before local training", "personalised": "after local training"}
    for moment, by_examples in evaluations.items():
        for examples, found in by_examples.items():
            values = [readable_metric(found.metrics.get(metric.label), metric) for metric in metrics]
            about = words.get(moment, moment), examples, str(found.num_examples)
            table.add_row(*map(escape, about), *values, f"{found.loss:.4g}")
    return table
