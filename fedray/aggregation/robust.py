"""Coordinate-wise trimmed means: of all points, or of all other points for each client.

The second is FedALT's `rest: trimmed_mean` (arXiv 2503.11880; an option beyond the paper). Trimming is Yin et al.'s
(arXiv 1803.01498, definition 2): in each coordinate the ⌊trim · n⌋ smallest and as many largest values are left out.
"""

import math

import numpy as np

from fedray.aggregation.points import BLOCK, check_points, column_blocks
from fedray.types import Vector


def trimmed_mean(points: Vector, trim: float, block: int = BLOCK) -> Vector:
    """Return the mean of what remains in each coordinate.

    Args:
        points: [n, d].
        trim: share left out at each end, 0 <= trim < 0.5; 0 is the mean.
        block: columns that are sorted at a time.

    Returns:
        [d].

    Raises:
        ValueError: no points, a point that is not finite, or trim out of range.
    """
    check_points(points, least=1)
    n = len(points)
    g = _left_out(trim, n)
    result = np.empty(points.shape[1], dtype=np.float32)
    for columns in column_blocks(points.shape[1], block):
        result[columns] = np.sort(points[:, columns], axis=0)[g : n - g].mean(axis=0, dtype=np.float64)
    return result


def leave_one_out_trimmed_means(points: Vector, trim: float, block: int = BLOCK) -> Vector:
    """Return row k = the trimmed mean of all points but the k-th, from one sort.

    With s the sorted column and S = s_g + … + s_{K−1−g}, leaving out a value below s_g moves the window up by one, so
    it loses s_g; above s_{K−1−g} it loses that; between them it loses the value itself: S − clip(x, s_g, s_{K−1−g}).

    Args:
        points: [K, d] with K >= 2.
        trim: share of the K − 1 others that is left out at each end: g = ⌊trim · (K − 1)⌋.
        block: columns that are sorted at a time.

    Returns:
        [K, d].

    Raises:
        ValueError: fewer than two points (no client has others), a point that is not finite, or trim out of range.
    """
    check_points(points, least=2)
    n = len(points)
    g = _left_out(trim, n - 1)
    result = np.empty(points.shape, dtype=np.float32)
    for columns in column_blocks(points.shape[1], block):
        window = np.sort(points[:, columns], axis=0)[g : n - g]
        lost = np.clip(points[:, columns], window[0], window[-1])
        result[:, columns] = (window.sum(axis=0, dtype=np.float64) - lost) / (n - 1 - 2 * g)
    return result


def _left_out(trim: float, n: int) -> int:
    """Return ⌊trim · n⌋, with 0.29 · 100 = 28.999… counted as 29."""
    if not 0 <= trim < 0.5:
        raise ValueError(f"expected trim (share left out at each end) with 0 <= trim < 0.5, got {trim}")
    return min(math.floor(trim * n + 1e-9), (n - 1) // 2)
