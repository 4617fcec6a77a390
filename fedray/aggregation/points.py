"""Checks a set of points, and reads it in blocks of columns, so that no float64 copy of the whole exists.

A point is one client's flat vector; K (or n) points are the rows of one float32 matrix [K, d].
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from fedray.types import Vector

Matrix = npt.NDArray[np.float64]
"""Any float64 array: what aggregation computes with."""

BLOCK = 4096
"""Columns per block: a block of 1,000 points takes 32 MiB in float64."""


def check_points(points: Vector, least: int) -> None:
    """Refuse points that no aggregation rule can use.

    Raises:
        ValueError: `points` is not [n, d] with n >= `least`, or a point holds NaN or infinity.
    """
    if points.ndim != 2:
        raise ValueError(f"expected points as a matrix [n, d], got shape {points.shape}")
    if len(points) < least:
        raise ValueError(f"expected at least {least} points, got {len(points)}")
    broken = [k for k, point in enumerate(points) if not np.isfinite(point).all()]
    if broken:
        raise ValueError(f"points {broken} hold NaN or infinity; leave these clients out before aggregating")


def check_weights(weights: npt.ArrayLike | None, n: int) -> Matrix:
    """Return weights [n] in float64 that sum to one; None means equal weights.

    Raises:
        ValueError: another length than n, a negative or not finite weight, or a sum that is not positive.
    """
    checked = np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64)
    if checked.shape != (n,):
        raise ValueError(f"expected one weight for each of {n} points, got shape {checked.shape}")
    if not np.isfinite(checked).all() or (checked < 0).any() or checked.sum() <= 0:
        raise ValueError(f"expected weights >= 0 with a positive sum, got {checked}")
    normalised: Matrix = checked / checked.sum()
    return normalised


def column_blocks(d: int, block: int) -> Iterator[slice]:
    """Yield slices that cover 0 to d-1 in order, each at most `block` wide.

    Raises:
        ValueError: block < 1.
    """
    if block < 1:
        raise ValueError(f"expected block >= 1 columns, got {block}")
    return (slice(start, min(start + block, d)) for start in range(0, d, block))


def lower_medians(points: Vector, block: int) -> Matrix:
    """Return the coordinate-wise medians [d]; of an even number of points the lower of the two in the middle, which
    takes a sixth of the time of their mean and is as good a centre."""
    middle = (len(points) - 1) // 2
    medians = np.empty(points.shape[1])
    for columns in column_blocks(points.shape[1], block):
        by_coordinate = np.ascontiguousarray(points[:, columns].T)
        by_coordinate.partition(middle, axis=1)
        medians[columns] = by_coordinate[:, middle]
    return medians


def gram_about(points: Vector, centre: Matrix, block: int) -> Matrix:
    """Return the inner products ⟨p_i − centre, p_j − centre⟩ as [n, n], subtracting before multiplying.

    Differences of float32 values are exact in float64, so close points far from the origin keep all their digits.
    """
    gram = np.zeros((len(points), len(points)))
    for _, centred in centred_blocks(points, centre, block):
        gram += centred @ centred.T
    return gram


def centred_blocks(points: Vector, centre: Matrix, block: int) -> Iterator[tuple[slice, Matrix]]:
    """Yield columns and their part of points − centre, [n, columns]; the next one is written over it, since new memory
    for each takes as long as the subtraction."""
    buffer = np.empty((len(points), min(block, points.shape[1])))
    for columns in column_blocks(points.shape[1], block):
        part = buffer[:, : columns.stop - columns.start]
        yield columns, np.subtract(points[:, columns], centre[columns], out=part)
