"""The clients' scores of a method in the final pass."""

from typing import get_args

import numpy as np
import pandas as pd

from fedray.errors import ComparisonError
from fedray.evaluation.metrics import configured_metric
from fedray.results.comparability import MethodRun
from fedray.types import Moment


class ClientScores:
    """The clients' scores of runs; each run's table is read once.

    Args:
        moment: whose score is `score`.
        metric: label of the metric.
    """

    def __init__(self, moment: Moment, metric: str):
        self.moment, self.metric = moment, metric
        self._read: dict[str, pd.DataFrame] = {}

    def of(self, one: MethodRun) -> pd.DataFrame:
        """Return a method's clients in the final pass: `score`, `aggregated` and `examples` by client. A score that is
        not finite is NaN.

        Raises:
            ComparisonError: no client has a score at that moment.
        """
        place = str(one.run.place)
        if place not in self._read:
            self._read[place] = self._final(one)
        table = self._read[place]
        rows = table[table["method"] == one.method].set_index("client").sort_index()
        frame = pd.DataFrame(
            {
                "score": _column(rows, self.moment),
                "aggregated": _column(rows, "aggregated"),
                "examples": _column(rows, "test_examples").fillna(0),
            }
        )
        if self.moment == "personalised" and one.config.evaluation.final == "aggregated":
            raise ComparisonError(
                f"not comparable: {one} has no personalised score: evaluation.final is aggregated; compare the moment "
                "aggregated"
            )
        if not frame["score"][frame["examples"] > 0].notna().any():
            raise ComparisonError(
                f"not comparable: {one} has no {self.moment} score of any client: not measured, or undefined"
            )
        return frame

    def _final(self, one: MethodRun) -> pd.DataFrame:
        """Return the final pass of a run: method, client, test_examples, and the metric at both moments. A run's first
        metric is in clients.parquet, the others are in evaluations.parquet."""
        scores = (f"{moment}_metric" for moment in get_args(Moment))
        table = one.run.clients(["method", "phase", "client", "test_examples", *scores])
        table = table[table["phase"] == "final"]
        if configured_metric(one.config).label == self.metric:
            return table.rename(columns={f"{moment}_metric": moment for moment in get_args(Moment)})
        found = one.run.evaluations()
        found = found[(found["phase"] == "final") & (found["examples"] == "test") & (found["group"] == "")]
        values = found[found["metric"] == self.metric].pivot(
            index=["method", "client"], columns="moment", values="value"
        )
        return table[["method", "client", "test_examples"]].merge(values, "left", on=["method", "client"])


def _column(rows: pd.DataFrame, name: str) -> pd.Series:
    """Return a column as float64, NaN where there is no finite number."""
    values = rows[name] if name in rows else pd.Series(np.nan, rows.index)
    return pd.to_numeric(values).astype(float).where(lambda found: np.isfinite(found))
