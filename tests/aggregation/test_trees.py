"""Trees of clients against dense matrices, scikit-learn's silhouette, and planted groups."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedray.aggregation.low_rank import LowRank
from fedray.aggregation.trees import best_cut, cosine_distances, cuts, silhouette


def update(rng, rank=2):
    return [LowRank(rng.normal(size=(6, rank)).astype("f"), rng.normal(size=(rank, 5)).astype("f")) for _ in range(2)]


def test_distances_are_those_of_the_dense_products():
    """Of unequal rank, and whatever factors a product has."""
    rng = np.random.default_rng(0)
    clients = [update(rng, rank) for rank in (1, 2, 3)]
    mix = rng.normal(size=(2, 2))
    clients.append([LowRank((x.B @ np.linalg.inv(mix)).astype("f"), (3 * mix @ x.A).astype("f")) for x in clients[1]])
    flat = np.stack([np.concatenate([x.dense().ravel() for x in client]) for client in clients]).astype(float)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    np.testing.assert_allclose(cosine_distances(clients), 1 - flat @ flat.T, atol=1e-6)
    assert cosine_distances(clients)[1, 3] == pytest.approx(0, abs=1e-6)


def test_zero_updates_are_equal_to_each_other_only():
    zero = [LowRank.zeros(6, 5, 2)] * 2
    found = cosine_distances([zero, update(np.random.default_rng(1)), zero])
    assert np.array_equal(found, [[0, 1, 0], [1, 0, 1], [0, 1, 0]])


@given(st.integers(0, 500), st.integers(3, 9), st.integers(2, 4))
def test_silhouettes_are_scikit_learns(seed, number, groups):
    from sklearn.metrics import silhouette_score

    rng = np.random.default_rng(seed)
    points = rng.normal(size=(number, 3))
    distances = np.linalg.norm(points[:, None] - points, axis=-1)
    labels = cuts(distances, groups)[-1]
    if labels.max() + 1 < number:
        assert silhouette(distances, labels) == pytest.approx(silhouette_score(distances, labels, metric="precomputed"))
    else:
        assert silhouette(distances, labels) == 0


def test_cuts_are_nested_and_numbered_by_first_clients():
    rng = np.random.default_rng(2)
    points = rng.normal(size=(7, 3))
    found = cuts(np.linalg.norm(points[:, None] - points, axis=-1), 99)
    assert [len(set(labels)) for labels in found] == [1, 2, 3, 4, 5, 6, 7]
    for coarse, fine in pairwise(found):
        assert len({(a, b) for a, b in zip(coarse, fine, strict=True)}) == len(set(fine))
        firsts = [list(fine).index(label) for label in range(fine.max() + 1)]
        assert firsts == sorted(firsts)
    assert [list(labels) for labels in cuts(np.zeros((1, 1)), 3)] == [[0]]


def test_planted_groups_are_found():
    """Three groups of clients around three updates at right angles, in any order."""
    rng = np.random.default_rng(3)
    centres, order = [update(rng) for _ in range(3)], [0, 1, 2, 1, 0, 2, 2, 0]
    noisy = [[LowRank(x.B + 0.1 * rng.normal(size=x.B.shape).astype("f"), x.A) for x in centres[g]] for g in order]
    distances = cosine_distances(noisy)
    candidates = cuts(distances, 6)
    best = best_cut(distances, candidates)
    assert best == 2
    assert list(candidates[best]) == order
    assert best_cut(np.zeros((4, 4)), cuts(np.zeros((4, 4)), 4)) == 0
