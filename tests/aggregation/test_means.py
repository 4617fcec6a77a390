import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedray.aggregation.means import leave_one_out_means, weighted_mean

deterministic = settings(deadline=None, derandomize=True, max_examples=40)
point_sets = st.tuples(st.integers(2, 7), st.integers(1, 5)).flatmap(
    lambda shape: arrays(np.float32, shape, elements=st.floats(-1e3, 1e3, width=32))
)


def test_weighted_mean_by_hand():
    """(3·(0, 0) + 1·(4, 8)) / 4 = (1, 2)."""
    points = np.array([[0, 0], [4, 8]], dtype=np.float32)
    mean = weighted_mean(points, [3, 1])
    assert mean.tolist() == [1, 2]
    assert mean.dtype == np.float32


def test_without_weights_all_count_the_same():
    points = np.array([[1, 2], [3, 4], [8, 3]], dtype=np.float32)
    assert weighted_mean(points).tolist() == [4, 3]


def test_sums_are_kept_in_float64():
    """In float32, 2²⁴ + 1 = 2²⁴, and the mean of (2²⁴, 1, −2²⁴) would come out as 0 instead of 1/3."""
    points = np.array([[2.0**24], [1], [-(2.0**24)]], dtype=np.float32)
    assert weighted_mean(points)[0] == np.float32(1 / 3)
    assert leave_one_out_means(np.vstack([points, points[:1]]))[3, 0] == np.float32(1 / 3)


@deterministic
@given(point_sets)
def test_leave_one_out_means_equal_the_plain_loop(points):
    loop = [np.delete(points, k, axis=0).mean(axis=0, dtype=np.float64) for k in range(len(points))]
    np.testing.assert_allclose(leave_one_out_means(points), loop, rtol=1e-6, atol=1e-9)


def test_of_two_points_each_gets_the_other():
    points = np.array([[0.1, 1e-3], [7, -3e5]], dtype=np.float32)
    assert np.array_equal(leave_one_out_means(points), points[::-1])


def test_alone_there_is_nobody_to_average():
    with pytest.raises(ValueError, match="at least 2 points, got 1"):
        leave_one_out_means(np.zeros((1, 3), dtype=np.float32))


@pytest.mark.parametrize("weights", [[1], [-1, 2], [0, 0], [np.nan, 1], [np.inf, 1]])
def test_unusable_weights_are_refused(weights):
    with pytest.raises(ValueError, match="weight"):
        weighted_mean(np.ones((2, 3), dtype=np.float32), weights)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_point_that_is_not_finite_is_named(bad):
    points = np.ones((4, 3), dtype=np.float32)
    points[2, 1] = bad
    with pytest.raises(ValueError, match=r"points \[2\] hold NaN or infinity"):
        weighted_mean(points)
    with pytest.raises(ValueError, match=r"points \[2\] hold NaN or infinity"):
        leave_one_out_means(points)


def test_a_vector_is_not_a_set_of_points():
    with pytest.raises(ValueError, match="matrix"):
        weighted_mean(np.ones(3, dtype=np.float32))
