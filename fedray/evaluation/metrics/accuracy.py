"""Accuracy: the share of examples whose class is predicted."""

from typing import Any

import numpy as np
import numpy.typing as npt

from fedray.config.metric import Metric


class Accuracy(Metric):
    """The share of equal entries."""

    name = "accuracy"
    tasks = ("classification",)
    proportion = True
    of_one_example = True

    def compute(self, predictions: npt.NDArray[Any], labels: npt.NDArray[Any]) -> float:
        return float(np.mean(predictions == labels))


ENTRY = Accuracy
