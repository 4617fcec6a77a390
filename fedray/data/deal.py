"""Dealing examples to clients by a matrix: how much of every stratum each client gets.

A stratum is a class, a task, or simply everything. A plan's `shares` [clients, strata] say which part of each stratum
goes to which client; integer counts are drawn from them, repaired where a client has too little, and then filled.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedray.data.examples import IntArray

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Plan:
    """One way of dealing.

    strata: stratum of every example, -1 for examples that nobody gets.
    shares: [clients, strata]; every column adds up to 1.
    free: whether a client may be given a few examples of a stratum in which its share is 0, to reach a minimum.
    """

    strata: IntArray
    shares: FloatArray
    free: bool

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Return which client may hold which stratum: [clients, strata]."""
        return np.ones_like(self.shares, dtype=bool) if self.free else self.shares > 0


def apportion(shares: FloatArray, sizes: IntArray, rng: np.random.Generator) -> IntArray:
    """Return whole numbers of examples near shares · sizes: [clients, strata]; every column adds up to its size.

    Systematic rounding: one random offset per stratum, so that every count is a neighbour of its exact value and
    equal to it on average.
    """
    edges = np.floor(np.cumsum(shares, axis=0) * sizes + rng.random(len(sizes)))
    edges[-1] = sizes  # what rounding errors of the cumulative sum would miss
    return np.diff(np.minimum(edges, sizes), axis=0, prepend=0).astype(np.int64)


def repair(counts: IntArray, minimum: int, shares: FloatArray, allowed: npt.NDArray[np.bool_]) -> IntArray:
    """Return counts in which poor clients got examples from the largest ones, up to `minimum` each where possible.

    An example comes from the stratum in which the poor client has the largest share, among those the donor can give.
    Nobody is made poor by giving, and nobody receives a stratum that it is not allowed.
    """
    counts = counts.copy()
    totals = counts.sum(axis=1)
    for poor in np.argsort(totals, kind="stable"):
        while totals[poor] < minimum:
            donors = (donor for donor in np.argsort(-totals, kind="stable") if totals[donor] > minimum)
            donor = next((donor for donor in donors if (allowed[poor] & (counts[donor] > 0)).any()), None)
            if donor is None:
                break
            # Among equal shares, the stratum of which the donor has most.
            score = shares[poor] + 1e-9 * counts[donor] / totals[donor]
            stratum = np.argmax(np.where(allowed[poor] & (counts[donor] > 0), score, -1.0))
            counts[donor, stratum] -= 1
            counts[poor, stratum] += 1
            totals[donor] -= 1
            totals[poor] += 1
    return counts


def fill(counts: IntArray, strata: IntArray, rng: np.random.Generator) -> IntArray:
    """Return the owner of every example (-1: nobody), drawn so that client k owns counts[k, c] of stratum c."""
    owner = np.full(len(strata), -1, dtype=np.int64)
    clients = np.arange(len(counts))
    for stratum in range(counts.shape[1]):
        rows = np.flatnonzero(strata == stratum)
        owner[rng.permutation(rows)] = np.repeat(clients, counts[:, stratum])
    return owner


def holders(rows_per_stratum: IntArray, num_clients: int, each: int, rng: np.random.Generator) -> FloatArray:
    """Return shares in which every client holds `each` different strata and every stratum has a holder.

    A client takes the strata with most rows per holder; each is divided evenly among its holders. Needs
    each <= strata <= clients · each.
    """
    held = np.zeros((num_clients, len(rows_per_stratum)), dtype=bool)
    for client in range(num_clients):
        count = held.sum(axis=0)
        rank = np.lexsort((rng.random(len(count)), -rows_per_stratum / (count + 1), count > 0))
        held[client, rank[:each]] = True
    return columns_of(held.astype(np.float64))


def columns_of(weights: FloatArray) -> FloatArray:
    """Return weights [clients, strata] scaled so that every column adds up to 1; an all-zero column becomes even."""
    totals = weights.sum(axis=0)
    even = np.full_like(weights, 1 / len(weights))
    shares: FloatArray = np.divide(weights, totals, out=even, where=totals > 0)
    return shares
