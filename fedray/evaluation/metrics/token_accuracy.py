"""Token accuracy: the share of answer tokens that are predicted, each from the true tokens before it."""

from typing import Any

import numpy as np
import numpy.typing as npt

from fedray.config.metric import Metric


class TokenAccuracy(Metric):
    """The share of equal entries, of which each is an answer token."""

    name = "token_accuracy"
    tasks = ("causal_lm",)
    of_one_example = True

    def compute(self, predictions: npt.NDArray[Any], labels: npt.NDArray[Any]) -> float:
        return float(np.mean(predictions == labels))


ENTRY = TokenAccuracy
