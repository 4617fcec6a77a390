"""The clients' scores of a method in the final pass."""

from typing import Literal

import numpy as np
import pandas as pd

from fedray.errors import ComparisonError
from fedray.results.comparability import MethodRun

Moment = Literal["personalised", "aggregated"]
"""When clients are measured in the final pass: after their last local training, or before it."""


def metric_column(moment: Moment) -> str:
    """Return the column of clients.parquet with the clients' scores at a moment."""
    return f"{moment}_metric"


class ClientScores:
    """The clients' scores of runs; each run's table is read once.

    Args:
        moment: whose score is `score`.
    """

    def __init__(self, moment: Moment):
        self.moment = moment
        self._read: dict[str, pd.DataFrame] = {}

    def of(self, one: MethodRun) -> pd.DataFrame:
        """Return a method's clients in the final pass: `score`, `aggregated` and `examples` by client. A score that is
        not finite is NaN.

        Raises:
            ComparisonError: no client has a score.
        """
        place = str(one.run.place)
        if place not in self._read:
            table = one.run.clients()
            self._read[place] = table[table["phase"] == "final"]
        table = self._read[place]
        rows = table[table["method"] == one.method].set_index("client").sort_index()
        frame = pd.DataFrame(
            {
                "score": _column(rows, metric_column(self.moment)),
                "aggregated": _column(rows, metric_column("aggregated")),
                "examples": _column(rows, "test_examples").fillna(0),
            }
        )
        if not frame["score"][frame["examples"] > 0].notna().any():
            raise ComparisonError(
                f"not comparable: {one} has no {self.moment} score of any client: not measured, or undefined"
            )
        return frame


def _column(rows: pd.DataFrame, name: str) -> pd.Series:
    """Return a column as float64, NaN where there is no finite number."""
    values = rows[name] if name in rows else pd.Series(np.nan, rows.index)
    return pd.to_numeric(values).astype(float).where(lambda found: np.isfinite(found))
