"""Means along a tree: right, and the same bits however the leaves are split, ordered and combined."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedray.aggregation.pairwise import Node, PairwiseMean, leaf


def mean_of(nodes: list[Node]) -> Node:
    mean = PairwiseMean()
    for node in nodes:
        mean.add(node)
    total = mean.total()
    assert total is not None
    return total


def drawn(n: int, seed: int) -> tuple[Any, Any]:
    """Points [n, 7] of very different sizes, and weights [n]."""
    rng = np.random.default_rng(seed)
    points = (rng.normal(size=(n, 7)) * 10.0 ** rng.integers(-6, 6, (n, 1))).astype(np.float32)
    return points, rng.integers(1, 1000, n)


def leaves(points: Any, weights: Any, places: Any = None) -> list[Node]:
    places = range(len(points)) if places is None else places
    return [leaf(k, float(weights[k]), [points[k, :3], points[k, 3:]]) for k in places]


def test_three_by_hand() -> None:
    """(1·2 + 3·6)/4 = 5, and then (4·5 + 4·9)/8 = 7."""
    points, weights = np.array([[2.0], [6.0], [9.0]], np.float32), (1, 3, 4)
    total = mean_of([leaf(k, w, [p]) for k, (w, p) in enumerate(zip(weights, points, strict=True))])
    assert (total.weight, total.leaves, total.arrays[0].tolist()) == (8, 3, [7.0])


@given(st.integers(1, 40), st.integers(0, 99))
def test_it_is_the_weighted_mean(n: int, seed: int) -> None:
    points, weights = drawn(n, seed)
    exact = [
        float(sum(int(w) * Fraction(float(p)) for w, p in zip(weights, column, strict=True)) / int(weights.sum()))
        for column in points.T
    ]
    found = np.concatenate(mean_of(leaves(points, weights)).arrays)
    scale = np.abs(points).max(axis=0)
    assert (np.abs(found - exact) <= 1e-6 * scale).all()


@given(st.integers(1, 40), st.integers(0, 99), st.data())
def test_bits_do_not_depend_on_who_averages_what(n: int, seed: int, data: st.DataObject) -> None:
    """Leaves come in any order, to any of three actors, which pass on what they have at any time; some never come."""
    points, weights = drawn(n, seed)
    present = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1)))
    expected = mean_of(leaves(points, weights, present))
    order = data.draw(st.permutations(present))
    actors = [PairwiseMean() for _ in range(3)]
    server = PairwiseMean()
    for node in leaves(points, weights, order):
        actor = actors[data.draw(st.integers(0, 2))]
        actor.add(node)
        if data.draw(st.booleans()):
            for part in actor.take():
                server.add(part)
    for actor in actors:
        for part in actor.take():
            server.add(part)
    found = server.total()
    assert found is not None
    assert (found.weight, found.leaves) == (expected.weight, len(present))
    for mine, theirs in zip(found.arrays, expected.arrays, strict=True):
        assert mine.tobytes() == theirs.tobytes()


@given(st.integers(1, 30))
def test_the_mean_of_equal_vectors_is_exact(n: int) -> None:
    points, weights = drawn(n, 1)
    points[:] = points[0]
    assert np.array_equal(np.concatenate(mean_of(leaves(points, weights)).arrays), points[0])


@given(st.integers(1, 33))
def test_what_came_in_is_never_written_to(n: int) -> None:
    """A client may keep the vector that it sent; and what was taken may be memory that cannot be written."""
    points, weights = drawn(n, 2)
    before = points.copy()
    points.flags.writeable = False
    half = PairwiseMean()
    for node in leaves(points, weights):
        half.add(node)
    parts = half.take()
    for part in parts:
        for array in part.arrays:
            array.flags.writeable = False
    mean_of(list(parts))
    assert np.array_equal(points, before)


def test_nobody_has_no_mean_and_zero_weights_are_refused() -> None:
    assert PairwiseMean().total() is None
    zeros = np.zeros(2, np.float32)
    with pytest.raises(ValueError, match="all weights are zero"):
        mean_of([leaf(0, 0, [zeros]), leaf(1, 0, [zeros])])
    for first, second in ((0, 2), (2, 0)):
        counted = np.full(2, 3, np.float32)
        nodes = [leaf(0, first, [counted + 1e8 * (first == 0)]), leaf(1, second, [counted + 1e8 * (second == 0)])]
        assert mean_of(nodes).arrays[0].tolist() == [3, 3], "1e8 counts for nothing"


@pytest.mark.parametrize("other", [np.zeros(1, np.float32), np.zeros((2, 1), np.float32), np.zeros(2)])
def test_other_shapes_and_types_are_refused(other: Any) -> None:
    with pytest.raises(ValueError, match="shapes differ"):
        mean_of([leaf(0, 1, [np.zeros(2, np.float32)]), leaf(1, 1, [other])])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -1])
def test_a_weight_that_means_nothing_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite weight"):
        leaf(0, bad, [np.zeros(1, np.float32)])
