"""The mean of Pearson's and Spearman's correlation, the one number that papers report for STS-B."""

from typing import Any

import numpy.typing as npt

from fedray.config.metric import Metric
from fedray.evaluation.metrics.pearson import Pearson
from fedray.evaluation.metrics.spearman import Spearman


class Combined(Metric):
    """(Pearson + Spearman) / 2; 0.0 where either side is constant. It is `combined_score` of transformers' run_glue."""

    name = "combined"
    tasks = ("regression",)
    libraries = Spearman.libraries
    percent = False

    def compute(self, predictions: npt.NDArray[Any], labels: npt.NDArray[Any]) -> float:
        return (Pearson().compute(predictions, labels) + Spearman().compute(predictions, labels)) / 2


ENTRY = Combined
