"""Pearson's correlation of predicted and true numbers (STS-B's metric in GLUE)."""

from typing import Any

import numpy as np
import numpy.typing as npt

from fedray.config.metric import Metric


class Pearson(Metric):
    """Pearson's correlation; 0.0 where either side is constant, as it is undefined there."""

    name = "pearson"
    tasks = ("regression",)
    percent = False

    def compute(self, predictions: npt.NDArray[Any], labels: npt.NDArray[Any]) -> float:
        x, y = (np.asarray(side, dtype=np.float64) for side in (predictions, labels))
        if np.ptp(x) == 0 or np.ptp(y) == 0:
            return 0.0
        return float(np.corrcoef(x, y)[0, 1])


ENTRY = Pearson
