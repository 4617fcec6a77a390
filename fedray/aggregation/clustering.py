"""Groups among clients: FedHFT's outer level (arXiv 2510.14054), a Gaussian mixture on the clients' update vectors.

There are far more values than clients, so the mixture is fitted in the span of the data: centred Gram matrix, leading
components of its eigendecomposition (at most 16), GaussianMixture with diagonal covariance and several seeded starts.

Choices of this project, with reasons:
- J groups' means span J − 1 dimensions, so a mixture of J components reads the first J + 1 coordinates: with a dozen
  clients and as many noise directions, more coordinates would let a component's variance collapse onto two or three
  clients.
- Variances have a floor, relative to the largest coordinate's variance: the groups do not depend on the updates' unit.
- `auto` compares models of the same data: the BIC counts a coordinate that a mixture does not read as one Gaussian.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from fedray.aggregation.points import BLOCK, Matrix, check_points, gram_about
from fedray.types import Vector

VARIANCE_FLOOR = 3e-3
"""Least variance of a component in units of the first coordinate's variance: a standard deviation of 5.5 %."""

EXTRA_DIMENSIONS = 2
"""Coordinates read beyond the J − 1 that the groups' means span, for groups that are not the largest variation."""


@dataclass(frozen=True)
class Mixture:
    """A fitted mixture.

    Attributes:
        posteriors: [K, J], rows sum to one.
        bic: lower is better; minus infinity where all points coincide.
        num_components: J.
    """

    posteriors: Matrix
    bic: float
    num_components: int


def centre_gram(gram: Matrix) -> Matrix:
    """Return the Gram matrix [K, K] of the same points about their mean (double centring, float64).

    What is left is set to zero where all of it is below the rounding of the input: the points are then identical.
    """
    means = gram.mean(axis=0)
    centred: Matrix = gram - means - means[:, np.newaxis] + means.mean()
    if np.abs(centred).max() <= 1e-13 * np.abs(gram).max():
        return np.zeros_like(centred)
    return (centred + centred.T) / 2


def gram_of(points: Vector, block: int = BLOCK) -> Matrix:
    """Return the centred Gram matrix [K, K] in float64 of points [K, d]; centred before the products, not after.

    Raises:
        ValueError: no points, or a point that is not finite.
    """
    check_points(points, least=1)
    return gram_about(points, points.mean(axis=0, dtype=np.float64), block)


def embed(gram: Matrix, max_components: int = 16) -> Matrix:
    """Return coordinates [K, c <= max_components] of the points behind a centred Gram matrix, largest variance first.

    Numerically zero components are dropped (c = 0 for identical points). Each coordinate is signed so that its entry
    of largest magnitude is positive.
    """
    values, vectors = np.linalg.eigh(gram)
    values, vectors = values[::-1][:max_components], vectors[:, ::-1][:, :max_components]
    kept = values > 1e-12 * max(values[0], 0)
    coordinates: Matrix = vectors[:, kept] * np.sqrt(values[kept])
    largest = np.abs(coordinates).argmax(axis=0)
    signs: Matrix = np.sign(coordinates[largest, np.arange(coordinates.shape[1])])
    return coordinates * signs


def fit_mixture(
    embedding: Matrix,
    num_components: int | Literal["auto"],
    seed: int,
    n_init: int = 5,
    max_components: int = 8,
) -> Mixture:
    """Return each client's posterior over the components of a Gaussian mixture.

    Args:
        embedding: [K, c] from `embed`.
        num_components: J, or `auto`: the J with the lowest BIC from 1 to max_components and at most K / 3, as groups of
            one or two clients fit any noise.
        seed: of the starts.
        n_init: number of starts, of which the best is kept.
        max_components: largest J of `auto`.

    Returns:
        Posteriors [K, J]; components are numbered in the order of their first clients. There are never more groups than
        distinct points: further components stay empty (zero columns, at the end). If all points are identical every
        client belongs to all J equally (`auto`: J = 1).

    Raises:
        ValueError: num_components, n_init or max_components below 1, or no clients.
    """
    J = max_components if num_components == "auto" else num_components
    if min(J, n_init, len(embedding)) < 1:
        raise ValueError(f"expected J, n_init and clients >= 1, got {J}, {n_init} and {len(embedding)}")
    if embedding.size == 0 or not embedding.any():
        J = 1 if num_components == "auto" else J
        return Mixture(np.full((len(embedding), J), 1 / J), float("-inf"), J)
    x = embedding / embedding[:, 0].std()
    if num_components == "auto":
        candidates = range(1, max(1, min(J, len(x) // 3)) + 1)
        return min((_fit(x, j, seed, n_init) for j in candidates), key=lambda mixture: mixture.bic)
    return _fit(x, J, seed, n_init)


def match_components(previous: Matrix, current: Matrix) -> Matrix:
    """Return `current` with its columns where the most similar previous ones are, so that cluster j stays cluster j.

    The assignment is the one-to-one one with the largest Σ_k previous[k, j] · current[k, j'] (Hungarian algorithm).

    Args:
        previous: memberships, [K, J].
        current: memberships of the same clients, [K, J'].

    Returns:
        [K, max(J, J')]. New clusters of a larger J' come last; with a smaller J', clusters that are gone keep their
        column, all zero.

    Raises:
        ValueError: the numbers of clients differ.
    """
    if len(previous) != len(current):
        raise ValueError(f"expected memberships of the same clients, got {len(previous)} and {len(current)} rows")
    J = max(previous.shape[1], current.shape[1])
    before, now = (np.pad(pi, ((0, 0), (0, J - pi.shape[1]))) for pi in (previous, current))
    _, order = linear_sum_assignment(before.T @ now, maximize=True)
    return now[:, order]


def _fit(x: Matrix, J: int, seed: int, n_init: int) -> Mixture:
    """Fit J components to x [K, c], whose first coordinate has variance one."""
    from sklearn.mixture import GaussianMixture  # a second of import that only the driver should take, for FedHFT

    read = min(x.shape[1], J - 1 + EXTRA_DIMENSIONS)
    # Rounded: identical points leave the eigendecomposition with coordinates that differ in their last digits.
    fitted = min(J, len(np.unique(x[:, :read].round(6), axis=0)))
    mixture = GaussianMixture(
        fitted,
        covariance_type="diag",
        reg_covar=VARIANCE_FLOOR,
        max_iter=500,
        n_init=n_init,
        random_state=seed % 2**32,
    ).fit(x[:, :read])
    posteriors = np.zeros((len(x), J))
    found = mixture.predict_proba(x[:, :read])
    posteriors[:, :fitted] = found[:, _by_first_client(found)]
    return Mixture(posteriors, float(mixture.bic(x[:, :read])) + _gaussian_bic(x[:, read:]), J)


def _by_first_client(posteriors: Matrix) -> npt.NDArray[np.intp]:
    """Return the components in the order of the first client that belongs most to each, empty ones last: starts
    that end in the same groups number them differently, and rounding decides which start wins."""
    mine = posteriors.argmax(axis=1)[:, None] == np.arange(posteriors.shape[1])
    first = np.where(mine.any(axis=0), mine.argmax(axis=0), len(posteriors))
    return np.argsort(first, kind="stable")


def _gaussian_bic(x: Matrix) -> float:
    """Return Σ over the coordinates of x [K, c] of the BIC of one Gaussian with the same variance floor."""
    variance = x.var(axis=0)
    floored = variance + VARIANCE_FLOOR
    minus_twice_log_likelihood = len(x) * (np.log(2 * np.pi * floored) + variance / floored)
    return float((minus_twice_log_likelihood + 2 * np.log(len(x))).sum())
