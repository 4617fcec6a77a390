"""Statistics of repeated runs."""

from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


def confidence_interval(values: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Return the 95 % confidence interval of the mean of independent, normally distributed values (Student's t).

    Args:
        values: the values, [n].

    Returns:
        The lower and the upper end; NaN for fewer than two values.
    """
    if len(values) < 2:
        return float("nan"), float("nan")
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)
