"""The Matthews correlation coefficient, for classes of unequal size (CoLA's metric in GLUE)."""

from typing import Any

import numpy.typing as npt

from fedray.config.metric import Metric


class Matthews(Metric):
    """The (multi-class) Matthews correlation; 0.0 where either side has a single class."""

    name = "matthews"
    tasks = ("classification",)
    libraries = ("sklearn.metrics",)
    percent = False

    def compute(self, predictions: npt.NDArray[Any], labels: npt.NDArray[Any]) -> float:
        from sklearn.metrics import matthews_corrcoef

        return float(matthews_corrcoef(labels, predictions))


ENTRY = Matthews
