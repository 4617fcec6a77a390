"""Means over clients: FedAvg's weighted mean, and for each client the mean of all others.

The second is All-But-Me with Agg = mean (FedReFT, arXiv 2508.20295) and the Rest-of-World average
A_k^R = 1/|J_k| Σ_{j∈J_k} A_j^L (FedALT, arXiv 2503.11880), which is unweighted.
"""

import numpy as np
import numpy.typing as npt

from fedray.aggregation.points import check_points, check_weights
from fedray.types import Vector


def weighted_mean(points: Vector, weights: npt.ArrayLike | None = None) -> Vector:
    """Return Σ_k w_k p_k / Σ_k w_k.

    Rows are added in the order given, so the result does not depend on the number of BLAS threads.

    Args:
        points: [K, d].
        weights: [K], >= 0, in any unit, such as numbers of examples; None means equal weights.

    Returns:
        [d].

    Raises:
        ValueError: no points, a point that is not finite, or weights that are negative or sum to zero.
    """
    check_points(points, least=1)
    total = np.zeros(points.shape[1])
    for weight, point in zip(check_weights(weights, len(points)), points, strict=True):
        total += weight * point
    return total.astype(np.float32)


def leave_one_out_means(points: Vector) -> Vector:
    """Return row k = the unweighted mean of all points but the k-th, as (total − p_k) / (K − 1) in float64.

    Args:
        points: [K, d] with K >= 2.

    Returns:
        [K, d].

    Raises:
        ValueError: fewer than two points (no client has others), or a point that is not finite.
    """
    check_points(points, least=2)
    total = points.sum(axis=0, dtype=np.float64)
    means = np.empty(points.shape, dtype=np.float32)
    for k, point in enumerate(points):
        means[k] = (total - point) / (len(points) - 1)
    return means
