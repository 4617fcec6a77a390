"""Geometric medians: one, or of every client's others (All-But-Me in FedReFT, arXiv 2508.20295).

    x* = argmin_x Σ_i w_i ‖p_i − x‖

Weiszfeld's iterates are weighted means x = Σ_i c_i p_i, and with G the points' Gram matrix

    ‖p_i − x‖² = G_ii − 2 (G c)_i + cᵀ G c,

so after one pass over the data all iterations happen on coefficients, for as many medians as wanted at once. G is taken
about the coordinate-wise median of the points and not about their mean: float64 loses the distances between honest
points when the origin lies 10⁸ times as far away as they are apart, and one hostile client can put the mean there.
Where an iterate meets a data point, Weiszfeld's map is replaced by Vardi and Zhang's (PNAS 97, 2000), which leaves the
point unless it is the median.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedray.aggregation.means import leave_one_out_means, weighted_mean
from fedray.aggregation.points import BLOCK, Matrix, check_points, check_weights, column_blocks, gram_about
from fedray.types import Vector


@dataclass(frozen=True)
class Weiszfeld:
    """When iterates coincide with points and when they are done; lengths are relative to the points' scale.

    The scale is the median distance of the points from their coordinate-wise median: hostile points cannot inflate it.

    smoothing: a point nearer than smoothing · scale counts as met by the iterate. Range 1e-8 to 1e-6; below 1e-8 it
        drowns in the rounding of the Gram matrix. 0 leaves only exact coincidence.
    tolerance: stop when the distance still to go, extrapolated from the last two steps as step² / (previous − step),
        is at most tolerance · scale: the default is ten times finer than the 1e-6 that results are good for.
    max_iterations: cap per median; the last iterate is returned. Reached where a data point all but is the median.
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

    points: [n, d]. weights: [n], >= 0; None means equal weights. Returns [d], good to 1e-6 of the points' scale, save
    where a data point all but is the median (the others pull within a few percent of its weight): there Weiszfeld's
    iterates creep and the cap decides, with a sum of distances within 1e-7 of the least. Two points of equal weight
    have every point between them as a median: their mean is returned.

    Raises:
        ValueError: no points, a point that is not finite, or weights that are negative or sum to zero.
    """
    check_points(points, least=1)
    checked = check_weights(weights, len(points))
    if len(points) <= 2 and (checked == checked[0]).all():
        return weighted_mean(points)
    median: Vector = _medians(points, checked[np.newaxis], settings, block)[0]
    return median


def leave_one_out_geometric_medians(points: Vector, settings: Weiszfeld = Weiszfeld(), block: int = BLOCK) -> Vector:
    """Return row k = the geometric median of all points but the k-th, all from one Gram matrix.

    points: [K, d] with K >= 2. Returns [K, d]. With K <= 3 every row is the mean of the others (see above).
    block: columns of `points` held in float64 at a time. Beyond blocks, about eight [K, K] float64 matrices are held.

    Raises:
        ValueError: fewer than two points (nobody has others), or a point that is not finite.
    """
    check_points(points, least=2)
    if len(points) <= 3:
        return leave_one_out_means(points)
    return _medians(points, 1 - np.eye(len(points)), settings, block)


def _medians(points: Vector, weights: Matrix, settings: Weiszfeld, block: int) -> Vector:
    """Return [m, d]: one median of `points` [n, d] for each row of `weights` [m, n]."""
    blocks = list(column_blocks(points.shape[1], block))
    centre = np.concatenate([np.median(points[:, columns], axis=0) for columns in blocks]).astype(np.float64)
    coefficients = _weiszfeld(gram_about(points, centre, block), weights, settings)
    medians = np.empty((len(weights), points.shape[1]), dtype=np.float32)
    for columns in blocks:
        medians[:, columns] = centre[columns] + coefficients @ (points[:, columns] - centre[columns])
    return medians


def _weiszfeld(gram: Matrix, weights: Matrix, settings: Weiszfeld) -> Matrix:
    """Return coefficients c [m, n], rows summing to one, of the medians under `weights` [m, n], from the means on."""
    squares = gram.diagonal()
    scale = float(np.median(np.sqrt(squares)))
    c: Matrix = weights / weights.sum(axis=1, keepdims=True)
    c_gram = c @ gram
    previous, done = np.full(len(c), np.nan), np.zeros(len(c), dtype=bool)
    for _ in range(settings.max_iterations):
        norms = (c_gram * c).sum(axis=1, keepdims=True)
        distances = np.sqrt(np.maximum(squares - 2 * c_gram + norms, 0))
        met = distances <= settings.smoothing * scale
        pulls = np.divide(weights, distances, out=np.zeros_like(c), where=~met)
        total = pulls.sum(axis=1, keepdims=True)
        target = np.divide(pulls, total, out=c.copy(), where=total > 0)
        target_gram = target @ gram
        gaps = np.sqrt(np.maximum(((target - c) * (target_gram - c_gram)).sum(axis=1), 0))
        stay = _stay(held=(weights * met).sum(axis=1), pulled=total[:, 0] * gaps)
        c = stay[:, np.newaxis] * c + (1 - stay)[:, np.newaxis] * target
        c_gram = stay[:, np.newaxis] * c_gram + (1 - stay)[:, np.newaxis] * target_gram
        steps = (1 - stay) * gaps
        done |= steps**2 <= settings.tolerance * scale * (previous - steps)
        if done.all():
            break
        previous = steps
    return c


def _stay(held: Matrix, pulled: Matrix) -> Matrix:
    """Return Vardi and Zhang's min(1, η/r): η the weight of the points met, r the pull of all others (0/0 is 1)."""
    stay: Matrix = np.divide(held, pulled, out=np.ones_like(held), where=held < pulled)
    return stay
