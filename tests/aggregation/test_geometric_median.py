import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize, minimize_scalar

from fedray.aggregation.geometric_median import Weiszfeld, geometric_median, leave_one_out_geometric_medians
from fedray.aggregation.means import leave_one_out_means, weighted_mean

deterministic = settings(deadline=None, derandomize=True, max_examples=25)
seeds = st.integers(0, 10**6)


def cloud(seed, n, d):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def spread(points):
    """The scale that the accuracy is relative to: median distance from the coordinate-wise median."""
    return np.median(np.linalg.norm(points - np.median(points.astype(np.float64), axis=0), axis=1))


def direct_median(points, iterations=400):
    """Textbook Weiszfeld on the vectors themselves, in float64, from the mean, without a stopping rule."""
    points = points.astype(np.float64)
    x = points.mean(axis=0)
    for _ in range(iterations):
        pulls = 1 / np.linalg.norm(points - x, axis=1)
        x = pulls @ points / pulls.sum()
    return x


def direct_medians(points, iterations=400):
    return np.array([direct_median(np.delete(points, k, axis=0), iterations) for k in range(len(points))])


def assert_close(result, expected, points, tolerance=1e-6):
    """Within `tolerance` of the points' scale, plus what the float32 result cannot resolve."""
    resolution = np.finfo(np.float32).eps * np.linalg.norm(expected, axis=-1)
    assert (np.linalg.norm(result - expected, axis=-1) <= tolerance * spread(points) + resolution).all()


@deterministic
@given(seeds, st.integers(4, 9), st.integers(2, 4), st.booleans())
def test_against_a_generic_optimiser(seed, n, d, weighted):
    """The sum of distances is as small as Nelder and Mead make it, up to the float32 rounding of the result."""
    points = cloud(seed, n, d)
    weights = np.random.default_rng(seed + 1).uniform(0.2, 2, n) if weighted else np.ones(n)

    def total_distance(x):
        return weights @ np.linalg.norm(points - x, axis=1)

    options = {"xatol": 1e-9, "fatol": 1e-13, "maxfev": 20_000}
    best = minimize(total_distance, points.mean(axis=0, dtype=np.float64), method="Nelder-Mead", options=options).fun
    assert total_distance(geometric_median(points, weights).astype(np.float64)) <= best * (1 + 1e-7)


@deterministic
@given(seeds, st.integers(4, 12), st.integers(20, 60))
def test_all_from_one_gram_matrix_equal_converged_direct_runs(seed, K, d):
    points = cloud(seed, K, d)
    assert_close(leave_one_out_geometric_medians(points), direct_medians(points), points)


def test_accuracy_with_many_values_far_from_the_origin():
    """Twenty clients that differ by 0.1 around values near 30: a raw float32 Gram matrix has no digit left here."""
    points = (30 + 0.1 * cloud(3, 20, 20_000)).astype(np.float32)
    separate = np.array([direct_median(np.delete(points, k, axis=0), 50) for k in range(0, 20, 5)])
    assert_close(leave_one_out_geometric_medians(points)[::5], separate, points)


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_the_block_width_changes_nothing(block):
    points = cloud(0, 6, 100)
    medians = leave_one_out_geometric_medians(points, block=block)
    np.testing.assert_allclose(medians, leave_one_out_geometric_medians(points), atol=1e-6)
    np.testing.assert_allclose(geometric_median(points, block=block), geometric_median(points), atol=1e-6)


def test_one_iteration_by_hand():
    """Points 0, 1, 5: the mean 2 lies 2, 1, 3 away, and (0/2 + 1/1 + 5/3) / (1/2 + 1/1 + 1/3) = 16/11. Twice that step
    from 2 leads to 10/11, past the median 1, where the sum of distances grows again: the step stays as it is.
    Points 0, 1, 8: from the mean 3, (0/3 + 1/2 + 8/5) / (1/3 + 1/2 + 1/5) = 63/31; twice that step leads to 33/31,
    where the sum still falls."""
    once = Weiszfeld(max_iterations=1)
    points = np.array([[[0], [1], [5]], [[0], [1], [8]]], dtype=np.float32)
    assert geometric_median(points[0], settings=once)[0] == pytest.approx(16 / 11, rel=1e-6)
    assert geometric_median(points[1], settings=once)[0] == pytest.approx(33 / 31, rel=1e-6)
    assert geometric_median(points[1])[0] == pytest.approx(1, abs=1e-6)


@deterministic
@given(seeds, st.integers(4, 8), st.integers(1, 6))
def test_the_sum_of_distances_never_grows(seed, n, iterations):
    points = cloud(seed, n, 3)

    def sum_after(iterations):
        x = geometric_median(points, settings=Weiszfeld(max_iterations=iterations))
        return np.linalg.norm(points - x.astype(np.float64), axis=1).sum()

    assert sum_after(iterations + 1) <= sum_after(iterations) * (1 + 1e-7)


def test_the_corner_of_a_wide_angle_is_the_median():
    """At (0, 0) the unit vectors to (±4, 1) sum to (0, 2/√17), shorter than 1: no direction leads downhill."""
    points = np.array([[-4, 1], [0, 0], [4, 1]], dtype=np.float32)
    assert geometric_median(points) == pytest.approx([0, 0], abs=1e-6)


@pytest.mark.parametrize("pull", [1.2, 1.02, 1.001, 0.999, 0.98])
def test_a_data_point_that_all_but_is_the_median(pull):
    """Points (1, 0) and (a, ±√(1 − a²)) with a = (pull − 1)/2 lie at distance 1 from the origin and pull at it with
    1 + 2a = pull, against its weight of 1. If they win, the median is at x = a: there the origin and (1, 0) cancel, and
    so do the other two. If not, it is the origin. Plain Weiszfeld is still up to 3e-3 away after 200 iterations."""
    a = (pull - 1) / 2
    points = np.array([[0, 0], [1, 0], [a, np.sqrt(1 - a * a)], [a, -np.sqrt(1 - a * a)]], dtype=np.float32)
    assert geometric_median(points) == pytest.approx([max(0, a), 0], abs=1e-6)


def test_a_start_on_a_data_point_is_left_again():
    """The mean of these points is the point (0, 0), where Weiszfeld's own map divides by zero. The others pull with
    −1 + 1 + 2/√1.25 ≈ 1.79 > 1 along x, so it is not the median; by symmetry the median lies on the x axis."""
    points = np.array([[0, 0], [-3, 0], [1, 0], [1, 0.5], [1, -0.5]], dtype=np.float32)
    assert weighted_mean(points) == pytest.approx([0, 0], abs=1e-15)
    on_axis = minimize_scalar(
        lambda x: np.linalg.norm(points - [x, 0], axis=1).sum(), bounds=(0, 2), options={"xatol": 1e-12}
    )
    assert on_axis.x > 0.5
    assert geometric_median(points) == pytest.approx([on_axis.x, 0], abs=1e-5)


def test_a_point_held_by_the_majority_is_the_median():
    """Three equal unit weights at one place hold against at most two unit pulls."""
    points = np.array([[1, 2], [1, 2], [1, 2], [50, 7], [-8, 90]], dtype=np.float32)
    assert geometric_median(points) == pytest.approx([1, 2], abs=1e-6)
    assert geometric_median(points[2:], [3, 1, 1]) == pytest.approx([1, 2], abs=1e-4)


@pytest.mark.parametrize("K", [1, 2, 5])
def test_identical_points_are_their_own_median(K):
    points = np.tile(np.array([[0.1, -3, 7e4]], dtype=np.float32), (K, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(geometric_median(points), points[0])
        if K > 1:
            assert np.array_equal(leave_one_out_geometric_medians(points), points)


@deterministic
@given(seeds)
def test_a_whole_weight_is_that_many_copies(seed):
    points = cloud(seed, 5, 3)
    copies = np.repeat(points, [1, 2, 1, 3, 1], axis=0)
    assert_close(geometric_median(points, [1, 2, 1, 3, 1]), geometric_median(copies).astype(np.float64), points, 2e-6)


@deterministic
@given(seeds, st.integers(4, 8))
def test_moves_turns_and_scales_with_the_points(seed, K):
    points = cloud(seed, K, 4)
    rng = np.random.default_rng(seed + 1)
    rotation = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    order = rng.permutation(K)
    medians = leave_one_out_geometric_medians(points).astype(np.float64)
    moved = (2.5 * points @ rotation + np.arange(4)).astype(np.float32)[order]
    expected = (2.5 * medians @ rotation + np.arange(4))[order]
    assert_close(leave_one_out_geometric_medians(moved), expected, moved, 3e-6)


@deterministic
@given(seeds, st.integers(0, 5))
def test_nobody_influences_what_it_gets_itself(seed, k):
    points = cloud(seed, 6, 5)
    changed = points.copy()
    changed[k] = -1e4 * points[k]
    before, after = leave_one_out_geometric_medians(points), leave_one_out_geometric_medians(changed)
    assert_close(after[k], before[k].astype(np.float64), points, 2e-6)


@pytest.mark.parametrize("K", [2, 3])
def test_with_up_to_three_clients_median_and_mean_agree_exactly(K):
    points = cloud(1, K, 5000)
    assert np.array_equal(leave_one_out_geometric_medians(points), leave_one_out_means(points))
    if K == 2:
        assert np.array_equal(leave_one_out_geometric_medians(points), points[::-1])
    np.testing.assert_allclose(geometric_median(points[:2]), weighted_mean(points[:2]), rtol=1e-6, atol=1e-9)


def test_two_points_of_unequal_weight_give_the_heavier_one():
    points = np.array([[0, 0], [3, 4]], dtype=np.float32)
    assert geometric_median(points, [1, 2]) == pytest.approx([3, 4], abs=1e-5)


@pytest.mark.parametrize("size", [10, 1e3, 1e8, 1e15])
def test_two_hostile_clients_of_eight_move_the_mean_but_not_the_median(size):
    """Honest updates are a common direction of length 10 plus noise of length 1; hostile ones are flipped and `size`
    times as long. However far away they stand, two hostile points pull with a force of at most 2 against that of 5 or
    6 honest ones: with these all at one place they could not move the median at all, so it stays within the noise.
    The mean moves by 1/7 or 2/7 of the hostile distance, which is 10 · size."""
    rng = np.random.default_rng(0)
    direction = rng.normal(size=200)
    direction *= 10 / np.linalg.norm(direction)
    updates = direction + rng.normal(size=(8, 200)) / np.sqrt(200)
    updates[6:] *= -size
    points = updates.astype(np.float32)

    medians = leave_one_out_geometric_medians(points).astype(np.float64)
    assert (np.linalg.norm(medians - direction, axis=1) < 1.5).all()
    assert_close(medians, direct_medians(points), points)
    means = leave_one_out_means(points).astype(np.float64)
    assert (np.linalg.norm(means - direction, axis=1) > size).all()


@pytest.mark.parametrize("rule", [geometric_median, leave_one_out_geometric_medians])
def test_points_that_are_not_finite_are_refused(rule):
    points = cloud(0, 5, 3)
    points[4, 0] = np.nan
    with pytest.raises(ValueError, match=r"points \[4\]"):
        rule(points)


def test_alone_there_is_nobody_to_take_a_median_of():
    with pytest.raises(ValueError, match="at least 2 points"):
        leave_one_out_geometric_medians(cloud(0, 1, 3))


@pytest.mark.parametrize("bad", [{"smoothing": -1.0}, {"tolerance": 0.0}, {"max_iterations": 0}])
def test_unusable_settings_are_refused(bad):
    with pytest.raises(ValueError, match="smoothing >= 0, tolerance > 0 and max_iterations >= 1"):
        Weiszfeld(**bad)


def test_without_the_client_at_whom_all_medians_would_be() -> None:
    """The median of all is client 0's point: nothing of it is left to begin the others' median with."""
    points = np.array([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]], np.float32)
    medians = leave_one_out_geometric_medians(points).astype(np.float64)
    np.testing.assert_allclose(medians[0], [0, 0], atol=1e-6)
    for k, median in enumerate(medians[1:], 1):  # three arms are left, and the sum of distances is flat at the centre
        assert np.linalg.norm(np.delete(points, k, axis=0) - median, axis=1).sum() == pytest.approx(3, rel=1e-7)
