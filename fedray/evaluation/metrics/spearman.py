"""Spearman's rank correlation of predicted and true numbers (STS-B's second metric in GLUE)."""

from typing import Any

import numpy as np
import numpy.typing as npt

from fedray.config.metric import Metric


class Spearman(Metric):
    """Pearson's correlation of the ranks, where equal numbers share their mean rank; 0.0 where either side is constant,
    as it is undefined there."""

    name = "spearman"
    tasks = ("regression",)
    libraries = ("scipy.stats",)
    percent = False

    def compute(self, predictions: npt.NDArray[Any], labels: npt.NDArray[Any]) -> float:
        from scipy.stats import spearmanr

        if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
            return 0.0
        return float(spearmanr(predictions, labels).statistic)


ENTRY = Spearman
