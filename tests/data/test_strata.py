"""Whole numbers of examples from shares of strata."""

from collections.abc import Callable

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedray.data.examples import Examples
from fedray.data.strata import apportion, repair

Labelled = Callable[..., Examples]


def test_repair_takes_from_the_largest_what_the_poor_has_a_share_in() -> None:
    counts = np.array([[6, 4], [3, 2], [0, 0]])
    shares = np.array([[0.6, 0.6], [0.4, 0.3], [0.0, 0.1]])
    repaired = repair(counts, 2, shares, np.ones((3, 2), dtype=bool))
    assert repaired.tolist() == [[6, 2], [3, 2], [0, 2]]
    only_first = np.array([[True, True], [True, True], [True, False]])
    assert repair(counts, 2, shares, only_first).tolist() == [[4, 4], [3, 2], [2, 0]]
    impossible = repair(np.array([[2, 0], [0, 1]]), 2, np.ones((2, 2)), np.ones((2, 2), dtype=bool))
    assert impossible.tolist() == [[2, 0], [0, 1]]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.integers(0, 50), st.integers(0, 9))
def test_apportioned_counts_are_neighbours_of_the_exact_ones(weights: list[float], size: int, seed: int) -> None:
    share = np.array(weights) + 1e-3
    share = (share / share.sum())[:, None]
    counts = apportion(share, np.array([size]), np.random.default_rng(seed))
    assert counts.sum() == size
    assert (np.abs(counts - share * size) < 1 + 1e-9).all()
    assert (counts >= 0).all()
