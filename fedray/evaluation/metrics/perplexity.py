"""Perplexity of the answer tokens: exp of their mean loss."""

from typing import Any

import numpy as np
import numpy.typing as npt

from fedray.config.metric import Metric


class Perplexity(Metric):
    """exp of the mean loss (in nats) of the tokens; infinite where that exceeds a float64."""

    name = "perplexity"
    tasks = ("causal_lm",)
    of_one_example = True
    reads = "losses"
    higher_is_better = False
    percent = False

    def compute(self, losses: npt.NDArray[Any]) -> float:
        with np.errstate(over="ignore"):
            return float(np.exp(np.mean(losses, dtype=np.float64)))


ENTRY = Perplexity
