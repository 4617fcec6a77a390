import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import trim_mean

from fedray.aggregation.means import leave_one_out_means, weighted_mean
from fedray.aggregation.robust import leave_one_out_trimmed_means, trimmed_mean

deterministic = settings(deadline=None, derandomize=True, max_examples=60)
# Few distinct values, so that ties at the window's ends are common.
point_sets = st.tuples(st.integers(2, 9), st.integers(1, 4)).flatmap(
    lambda shape: arrays(np.float32, shape, elements=st.sampled_from([-1e6, -3, -1, 0, 0.5, 2, 7, 1e6]))
)


def test_by_hand():
    """⌊0.25 · 4⌋ = 1 value leaves each end: (2 + 3) / 2 and (5 + 1) / 2."""
    points = np.array([[100, 1], [2, 5], [1, -9], [3, 50]], dtype=np.float32)
    assert trimmed_mean(points, 0.25).tolist() == [2.5, 3]


def test_leave_one_out_by_hand():
    """Others of 100 are 1, 2, 3, 4, less the ends: 2.5. Others of 1 are 2, 3, 4, 100: 3.5. Of 3: 1, 2, 4, 100: 3."""
    points = np.array([[100], [1], [3], [2], [4]], dtype=np.float32)
    assert leave_one_out_trimmed_means(points, 0.25)[:3, 0].tolist() == [2.5, 3.5, 3]


@deterministic
@given(point_sets, st.sampled_from([0, 0.1, 0.2, 0.25, 0.4, 0.49]))
def test_against_scipy_and_the_plain_loop(points, trim):
    np.testing.assert_allclose(trimmed_mean(points, trim), trim_mean(points.astype(np.float64), trim), rtol=1e-6)
    loop = [trim_mean(np.delete(points, k, axis=0).astype(np.float64), trim) for k in range(len(points))]
    np.testing.assert_allclose(leave_one_out_trimmed_means(points, trim), loop, rtol=1e-6, atol=1e-9)


@deterministic
@given(point_sets)
def test_nothing_trimmed_is_the_mean(points):
    np.testing.assert_allclose(trimmed_mean(points, 0), weighted_mean(points), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(
        leave_one_out_trimmed_means(points, 0), leave_one_out_means(points), rtol=1e-6, atol=1e-9
    )


def test_rounding_of_the_share_drops_no_value_too_few():
    """0.29 · 100 is 28.999999999999996 in float64. Of 0² … 99², 29² … 70² remain: (Σ_{29}^{70} i²) / 42."""
    points = (np.arange(100, dtype=np.float32) ** 2)[:, np.newaxis]
    assert trimmed_mean(points, 0.29)[0] == np.float32(sum(i * i for i in range(29, 71)) / 42)


def test_hostile_values_do_not_reach_the_others():
    """One hostile client of five and one value trimmed at each end: everybody's result lies between honest values."""
    points = np.array([[1], [2], [3], [4], [-1e30]], dtype=np.float32)
    assert leave_one_out_trimmed_means(points, 0.25)[:, 0].tolist() == [2.5, 2, 1.5, 1.5, 2.5]


def test_the_block_width_changes_nothing():
    points = np.random.default_rng(0).normal(size=(6, 50)).astype(np.float32)
    assert np.array_equal(trimmed_mean(points, 0.2, block=7), trimmed_mean(points, 0.2))
    assert np.array_equal(leave_one_out_trimmed_means(points, 0.2, block=7), leave_one_out_trimmed_means(points, 0.2))
    with pytest.raises(ValueError, match="block >= 1"):
        trimmed_mean(points, 0.2, block=0)


@pytest.mark.parametrize("trim", [-0.1, 0.5, np.nan])
@pytest.mark.parametrize("rule", [trimmed_mean, leave_one_out_trimmed_means])
def test_impossible_shares_are_refused(rule, trim):
    with pytest.raises(ValueError, match=r"0 <= trim < 0\.5"):
        rule(np.ones((4, 2), dtype=np.float32), trim)


def test_points_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match=r"points \[1\]"):
        trimmed_mean(np.array([[0], [np.nan]], dtype=np.float32), 0.1)
    with pytest.raises(ValueError, match=r"points \[0\]"):
        leave_one_out_trimmed_means(np.array([[np.inf], [1]], dtype=np.float32), 0.1)
