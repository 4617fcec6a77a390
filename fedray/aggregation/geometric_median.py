"""Geometric medians: of all points, or of all other points for each client (All-But-Me in FedReFT, arXiv 2508.20295).

    x* = argmin_x Σ_i w_i ‖p_i − x‖

Weiszfeld's iterates are weighted means x = Σ_i c_i p_i, and with G the points' Gram matrix

    ‖p_i − x‖² = G_ii − 2 (G c)_i + cᵀ G c,

so after one pass over the data all iterations happen on coefficients, for as many medians as wanted at once. G is taken
about the coordinate-wise median of the points and not about their mean: float64 loses the distances between honest
points when the origin is 10⁸ times as far away as they are apart, and one hostile client can move the mean that far.

Weiszfeld's own map has two weaknesses. It is undefined where an iterate meets a data point, so Vardi and Zhang's map
(PNAS 97, 2000) is used, which leaves the point unless it is the median. It converges slowly close to data points, so
each iterate is extrapolated from the value of the map by as much as the value has moved since the last one, if the sum
of distances falls all the way (Polyak's momentum, safeguarded by convexity).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedray.aggregation.means import leave_one_out_means
from fedray.aggregation.points import (
    BLOCK,
    Matrix,
    centred_blocks,
    check_points,
    check_weights,
    gram_about,
    lower_medians,
)
from fedray.types import Vector


@dataclass(frozen=True)
class Weiszfeld:
    """When an iterate has met a data point, and when the iterations stop.

    Attributes:
        smoothing: a point at most smoothing · scale away counts as met. The scale is the median distance of the points
            from their coordinate-wise median, which hostile points cannot inflate. Range 1e-8 to 1e-6: distances below
            1e-8 drown in the rounding of the Gram matrix; 0 leaves only exact coincidence.
        tolerance: the iterations stop when the slope of the sum of distances is at most tolerance times Σ_i w_i, its
            largest possible value. The iterate is then about tolerance · scale from the median.
        max_iterations: cap, after which the iterate is returned as it is. Ten are usual, some tens near a data point.
    """

    smoothing: float = 1e-7
    tolerance: float = 1e-7
    max_iterations: int = 200

    def __post_init__(self) -> None:
        if self.smoothing < 0 or self.tolerance <= 0 or self.max_iterations < 1:
            raise ValueError(f"expected smoothing >= 0, tolerance > 0 and max_iterations >= 1, got {self}")


def geometric_median(
    points: Vector, weights: npt.ArrayLike | None = None, settings: Weiszfeld = Weiszfeld(), block: int = BLOCK
) -> Vector:
    """Return the point with the least weighted sum of distances to `points`.

    Two points of equal weight have every point between them as a median: the iterates start, and stay, at their mean.

    Args:
        points: [n, d].
        weights: [n], >= 0; None means equal weights.
        settings: when the iterations stop.
        block: columns of `points` that are held in float64 at a time.

    Returns:
        [d], accurate to 1e-6 of the points' scale. Where a data point nearly is the median, the sum of distances is
        flat and accurate to 1e-7.

    Raises:
        ValueError: no points, a point that is not finite, or weights that are negative or sum to zero.
    """
    check_points(points, least=1)
    checked = check_weights(weights, len(points))
    median: Vector = _medians(points, checked[np.newaxis], settings, block)[0]
    return median


def leave_one_out_geometric_medians(points: Vector, settings: Weiszfeld = Weiszfeld(), block: int = BLOCK) -> Vector:
    """Return row k = the geometric median of all points but the k-th, all from one Gram matrix.

    Besides the blocks, about eight [K, K] float64 matrices are held.

    Args:
        points: [K, d] with K >= 2.
        settings: when the iterations stop.
        block: columns of `points` that are held in float64 at a time.

    Returns:
        [K, d]. With K <= 3 every row is the mean of the others, as for two points above.

    Raises:
        ValueError: fewer than two points (no client has others), or a point that is not finite.
    """
    check_points(points, least=2)
    if len(points) <= 3:
        return leave_one_out_means(points)
    return _medians(points, 1 - np.eye(len(points)), settings, block)


def _medians(points: Vector, weights: Matrix, settings: Weiszfeld, block: int) -> Vector:
    """Return [m, d]: one median of `points` [n, d] for each row of `weights` [m, n]."""
    centre = lower_medians(points, block)
    coefficients = _weiszfeld(gram_about(points, centre, block), weights, settings)
    # Medians of all but one differ little from each other: float32, twice as fast, is enough for the differences.
    common = coefficients.mean(axis=0)
    own = (coefficients - common).astype(np.float32)
    medians = np.empty((len(weights), points.shape[1]), dtype=np.float32)
    for columns, centred in centred_blocks(points, centre, block):
        np.matmul(own, centred.astype(np.float32), out=medians[:, columns])
        medians[:, columns] += (centre[columns] + common @ centred).astype(np.float32)
    return medians


def _weiszfeld(gram: Matrix, weights: Matrix, settings: Weiszfeld) -> Matrix:
    """Return coefficients c [m, n], rows summing to one, of the medians under `weights` [m, n]."""
    radius = settings.smoothing * float(np.median(np.sqrt(gram.diagonal())))
    c = _start(gram, weights, settings)
    c_gram = c @ gram
    last, last_gram = c, c_gram
    for _ in range(settings.max_iterations):
        target, target_gram, downhill = _vardi_zhang(gram, weights, c, c_gram, radius)
        if (downhill <= settings.tolerance * weights.sum(axis=1)).all():
            break
        # From target to target, not from iterate to target: where points are affinely dependent, coefficients can grow
        # without moving x, and leaps upon leaps would let them; the map's values start from weighted means each time.
        step, step_gram = target - last, target_gram - last_gram
        leap, leap_gram = target + step, target_gram + step_gram
        falls = _falls_along(gram, weights, leap, leap_gram, step, step_gram)
        c, c_gram = np.where(falls, leap, target), np.where(falls, leap_gram, target_gram)
        last, last_gram = target, target_gram
    return c


def _start(gram: Matrix, weights: Matrix, settings: Weiszfeld) -> Matrix:
    """Return coefficients [m, n] to begin with: the means, or, of several medians, what they have of the median under
    their weights' mean, where that is most of it."""
    means: Matrix = weights / weights.sum(axis=1, keepdims=True)
    if len(weights) == 1:
        return means
    common = weights * _weiszfeld(gram, weights.mean(axis=0, keepdims=True), settings)
    total = common.sum(axis=1, keepdims=True)
    np.divide(common, total, out=means, where=total > 0.5 * weights.max(axis=1, keepdims=True))
    return means


def _vardi_zhang(
    gram: Matrix, weights: Matrix, c: Matrix, c_gram: Matrix, radius: float
) -> tuple[Matrix, Matrix, Matrix]:
    """Return Vardi and Zhang's map of c as [m, n], its product with the Gram matrix, and the slope downhill [m].

    With r the length of Σ_i w_i (p_i − x)/‖p_i − x‖ over the points not met and η the weight of those met, the map goes
    the share max(0, 1 − η/r) of the way that Weiszfeld's map would, and the slope is max(0, r − η).
    """
    distances = _distances(gram, c, c_gram)
    met = distances <= radius
    pulls = np.divide(weights, distances, out=np.zeros_like(c), where=~met)
    total = pulls.sum(axis=1, keepdims=True)
    mean = np.divide(pulls, total, out=c.copy(), where=total > 0)
    mean_gram = mean @ gram
    r = total[:, 0] * np.sqrt(np.maximum(((mean - c) * (mean_gram - c_gram)).sum(axis=1), 0))
    downhill = np.maximum(r - (weights * met).sum(axis=1), 0)
    share = np.divide(downhill, r, out=np.zeros_like(r), where=r > 0)[:, np.newaxis]
    return share * mean + (1 - share) * c, share * mean_gram + (1 - share) * c_gram, downhill


def _falls_along(
    gram: Matrix, weights: Matrix, c: Matrix, c_gram: Matrix, step: Matrix, step_gram: Matrix
) -> npt.NDArray[np.bool_]:
    """Return [m, 1]: whether the sum of distances still falls at c along `step`; being convex, it fell all the way.

    The slope Σ_i w_i ⟨x − p_i, step⟩ / ‖p_i − x‖ keeps its digits where the sums themselves are all hostile distance.
    """
    distances = _distances(gram, c, c_gram)
    along = (c * step_gram).sum(axis=1, keepdims=True) - step_gram
    slopes = np.divide(weights * along, distances, out=np.zeros_like(c), where=distances > 0)
    falls: npt.NDArray[np.bool_] = slopes.sum(axis=1, keepdims=True) < 0
    return falls


def _distances(gram: Matrix, c: Matrix, c_gram: Matrix) -> Matrix:
    """Return ‖p_i − x_b‖ as [m, n]; rounding may leave the square of a tiny one below zero."""
    squares: Matrix = gram.diagonal() - 2 * c_gram + (c * c_gram).sum(axis=1, keepdims=True)
    distances: Matrix = np.sqrt(np.maximum(squares, 0))
    return distances
