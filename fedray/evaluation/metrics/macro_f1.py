"""Macro F1: the unweighted mean of the classes' F1, for classes of unequal size."""

from typing import Any

import numpy.typing as npt

from fedray.config.metric import Metric


class MacroF1(Metric):
    """The mean F1 of the classes that occur among the predictions or the labels.

    A class that occurs on one side only has an F1 of 0.0. A class that occurs on neither side does not count.
    """

    name = "macro_f1"
    tasks = ("classification",)
    libraries = ("sklearn.metrics",)

    def compute(self, predictions: npt.NDArray[Any], labels: npt.NDArray[Any]) -> float:
        from sklearn.metrics import f1_score

        return float(f1_score(labels, predictions, average="macro", zero_division=0.0))


ENTRY = MacroF1
