"""Agglomerative clustering of clients by the cosine of their updates (FedLEASE, arXiv 2509.15087; FedTreeLoRA, arXiv
2603.13282): one tree, whose cuts are compared by their silhouettes. A cut into single clients has none (0).

The papers compare raw B. Here the products B A are compared: (B, A) and (B M⁻¹, M A) are one update.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.spatial.distance import squareform

from fedray.aggregation.low_rank import LowRank, gram
from fedray.aggregation.points import Matrix

Labels = npt.NDArray[np.int64]
"""A cluster per client, [K], numbered in the order of their first clients."""


ROUNDING = 1e-6
"""Distance below which two updates count as equal."""


def cosine_distances(clients: Sequence[Sequence[LowRank]]) -> Matrix:
    """Return 1 − ⟨x_k, x_l⟩ / (‖x_k‖ ‖x_l‖), [K, K], over all of a client's matrices together; 0 where it is rounding.
    Zero updates are equal to each other and at right angles to all others.

    Args, Raises: as `gram`.
    """
    products = gram(clients)
    norms = np.sqrt(np.diag(products).clip(min=0))
    zero = norms == 0
    cosines = products / np.where(zero, 1, norms) / np.where(zero, 1, norms)[:, np.newaxis]
    distances: Matrix = np.where(zero & zero[:, np.newaxis], 0, 1 - cosines.clip(-1, 1))
    return np.where(distances < ROUNDING, 0, distances)


def mean_distances(clients: Sequence[Sequence[LowRank]]) -> Matrix:
    """Return the mean over a client's matrices of `cosine_distances` of each one alone, [K, K]."""
    mean: Matrix = np.mean([cosine_distances([[x] for x in target]) for target in zip(*clients, strict=True)], axis=0)
    return mean


def cuts(distances: Matrix, most: int) -> list[Labels]:
    """Return the cuts of the tree of average linkage into 1, 2, ... clusters: at most `most`, but always the first, and
    at most one cluster per client.

    Args:
        distances: [K, K], K >= 1.
    """
    number = len(distances)
    if number == 1:
        return [np.zeros(1, np.int64)]
    tree = linkage(squareform(distances, checks=False), "average")
    return [
        _numbered(cut_tree(tree, n_clusters=clusters)[:, 0]) for clusters in range(1, max(1, min(most, number)) + 1)
    ]


def silhouette(distances: Matrix, labels: Labels) -> float:
    """Return the mean silhouette (b − a) / max(a, b): a is a client's mean distance from the others of its cluster, b
    from the nearest other cluster. 0 for a client alone in its cluster, for equal clients, and for one cluster."""
    members = labels[:, np.newaxis] == np.arange(labels.max() + 1)
    sizes = members.sum(0)
    if len(sizes) == 1:
        return 0.0
    totals = distances @ members
    own = members[np.arange(len(labels)), labels] & (sizes[labels] > 1)
    a = totals[np.arange(len(labels)), labels] / np.maximum(sizes[labels] - 1, 1)
    b = np.where(members, np.inf, totals / sizes).min(1)
    largest = np.maximum(a, b)
    return float(np.where(own & (largest > 0), (b - a) / np.where(largest > 0, largest, 1), 0).mean())


def best_cut(distances: Matrix, candidates: Sequence[Labels]) -> int:
    """Return the index of the candidate with the largest silhouette, the first of equal ones."""
    scores = [round(silhouette(distances, labels), 12) for labels in candidates]
    return scores.index(max(scores))


def _numbered(labels: npt.NDArray[np.integer]) -> Labels:
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]
