"""Means of LoRA products against the dense formulas of each paper."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedray.aggregation.low_rank import LowRank, concatenate, truncate
from fedray.aggregation.products import (
    component_sums,
    keep_alive,
    least_squares,
    live,
    mean_factors,
    norm,
    pad,
    residual,
    ridge,
)

properties = settings(max_examples=40)
seeds = st.integers(0, 10**6)
sizes = st.integers(1, 9)
cohorts = st.integers(1, 5)


def dense(x):
    """The matrix in float64, independent of LowRank's own methods."""
    return x.B.astype(np.float64) @ x.A.astype(np.float64)


def cohort(seed, K, d_out=8, d_in=7, r=2):
    """K clients' factors and weights."""
    rng = np.random.default_rng(seed)
    factors = [
        LowRank(rng.normal(size=(d_out, r)).astype(np.float32), rng.normal(size=(r, d_in)).astype(np.float32))
        for _ in range(K)
    ]
    return factors, rng.dirichlet(np.ones(K))


def means(factors, weights):
    """B̄, Ā and Δ̄ in float64."""
    return (
        sum(w * x.B.astype(np.float64) for w, x in zip(weights, factors, strict=True)),
        sum(w * x.A.astype(np.float64) for w, x in zip(weights, factors, strict=True)),
        sum(w * dense(x) for w, x in zip(weights, factors, strict=True)),
    )


def error(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def test_padding_adds_components_that_are_zero():
    (x,), _ = cohort(0, 1)
    wide = pad(x, 5)
    assert (wide.B.shape, wide.A.shape) == ((8, 5), (5, 7))
    assert np.array_equal(wide.B[:, :2], x.B)
    assert np.array_equal(wide.A[:2], x.A)
    assert not wide.B[:, 2:].any()
    assert not wide.A[2:].any()
    with pytest.raises(ValueError, match="at most 1 components, got 2"):
        pad(x, 1)


@properties
@given(seeds, sizes, sizes, st.integers(0, 4))
def test_the_norm_is_that_of_the_product(seed, d_out, d_in, r):
    (x,), _ = cohort(seed, 1, d_out, d_in, r)
    assert norm(x) == pytest.approx(np.linalg.norm(dense(x)), rel=1e-6, abs=1e-6)


def test_a_norm_by_hand():
    """[[3], [4]] · [[1, 2, 2]] has norm 5 · 3."""
    assert norm(LowRank(np.float32([[3], [4]]), np.float32([[1, 2, 2]]))) == pytest.approx(15)


def test_mean_factors_by_hand():
    """1 and 3 examples: (1 · 2 + 3 · 6) / 4 = 5 and (1 · 1 − 3 · 1) / 4 = −0.5."""
    factors = [LowRank(np.float32([[2]]), np.float32([[1]])), LowRank(np.float32([[6]]), np.float32([[-1]]))]
    mean = mean_factors(factors, [1, 3])
    assert (mean.B.item(), mean.A.item()) == (5, -0.5)


def test_component_sums_by_hand():
    """Component 0 is the first client's, component 1 a quarter of the first's and twice the second's."""
    factors, _ = cohort(0, 2)
    found = component_sums(factors, np.array([[1, 0.25], [0, 2]]))
    for component, shares in enumerate(((1, 0), (0.25, 2))):
        b, a = (
            sum(share * part[component] for share, part in zip(shares, parts, strict=True))
            for parts in ([x.B.T for x in factors], [x.A for x in factors])
        )
        np.testing.assert_allclose(found.B[:, component], b, atol=1e-6)
        np.testing.assert_allclose(found.A[component], a, atol=1e-6)
    with pytest.raises(ValueError, match=r"shares of \(2, 2\) clients and components, got shape \(2,\)"):
        component_sums(factors, np.ones(2))


@pytest.mark.parametrize("function", [mean_factors, residual, ridge, least_squares])
def test_factors_of_different_shapes_and_bad_weights_are_refused(function):
    with pytest.raises(ValueError, match="at least one pair of factors"):
        function([])
    with pytest.raises(ValueError, match="all of one shape"):
        function([LowRank.zeros(3, 2, 1), LowRank.zeros(3, 2, 2)])
    with pytest.raises(ValueError, match="one weight for each of 2"):
        function([LowRank.zeros(3, 2, 1)] * 2, [1.0])


@properties
@given(seeds, cohorts, sizes, sizes, st.integers(1, 3))
def test_mean_factors_and_residual_make_the_mean_product(seed, K, d_out, d_in, r):
    """In (K − 1) r columns: fewer than one pair of factors per client."""
    factors, weights = cohort(seed, K, d_out, d_in, r)
    mean, rest = mean_factors(factors, weights), residual(factors, weights)
    assert rest.rank == (K - 1) * r
    np.testing.assert_allclose(dense(mean) + dense(rest), means(factors, weights)[2], atol=3e-6)


def test_equal_factors_leave_no_residual():
    """A common A: zero whatever the B_k, bit for bit. A common B: zero to rounding."""
    factors, weights = cohort(1, 4)
    common_a = [LowRank(x.B, factors[0].A) for x in factors]
    assert not residual(common_a, weights).A.any()
    common_b = [LowRank(factors[0].B, x.A) for x in factors]
    assert np.abs(dense(residual(common_b, weights))).max() < 1e-6
    assert residual(factors[:1]).rank == 0


@properties
@given(seeds, st.integers(0, 6), st.integers(1, 6))
def test_live_components_have_the_same_product_and_can_be_trained(seed, r, rank):
    """The gradient of A_i is Bᵢᵀ G, that of B_i is G A_iᵀ: one of the two vectors must not be zero."""
    (x,), _ = cohort(seed, 1, r=r)
    cut = truncate(x, rank)
    draw = np.random.default_rng(seed + 1).normal(size=cut.A.shape).astype(np.float32)
    alive = live(cut, draw)
    np.testing.assert_allclose(dense(alive), dense(cut), atol=1e-5)
    assert (np.linalg.norm(alive.A, axis=1) > 0).all()
    kept = min(r, rank)
    assert np.array_equal(alive.A[:kept], cut.A[:kept])
    assert np.array_equal(alive.A[kept:], draw[kept:])


def test_a_component_is_dead_below_a_millionth_of_the_first():
    """Singular values 1, 2e-6 and 0.5e-6, of which only the last is replaced."""
    roots = np.sqrt(np.float32([1, 2e-6, 0.5e-6]))
    alive = live(LowRank(np.diag(roots), np.diag(roots)), np.full((3, 3), 7, np.float32))
    np.testing.assert_array_equal(alive.B, np.diag([*roots[:2], 0]))
    np.testing.assert_array_equal(alive.A, [[roots[0], 0, 0], [0, roots[1], 0], [7, 7, 7]])
    with pytest.raises(ValueError, match="shape of A"):
        live(LowRank.zeros(3, 3, 2), np.zeros((3, 3), np.float32))


def test_of_a_zero_matrix_every_component_is_drawn():
    draw = np.ones((2, 3), np.float32)
    alive = live(LowRank.zeros(4, 3, 2), draw)
    assert np.array_equal(alive.A, draw)
    assert not alive.B.any()


@properties
@given(seeds, cohorts, st.floats(1e-3, 10))
def test_ridge_is_loras_fair_closed_form(seed, K, strength):
    """B = (Σ w_k B_k (A_k Āᵀ) + μ B̄)(Ā Āᵀ + μ I)⁻¹, μ = λ tr(Ā Āᵀ) / r; and the gradient of its objective is zero."""
    factors, weights = cohort(seed, K)
    mean_b, mean_a, mean = means(factors, weights)
    found = ridge(factors, weights, strength)
    mu = strength * np.trace(mean_a @ mean_a.T) / 2
    expected = (mean @ mean_a.T + mu * mean_b) @ np.linalg.inv(mean_a @ mean_a.T + mu * np.eye(2))
    np.testing.assert_allclose(found.B, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.A, mean_a, atol=1e-6)


def test_ridge_without_a_penalty_leaves_nothing_in_the_rows_of_the_mean():
    """λ = 0: (B Ā − Δ̄) Āᵀ = 0. λ without limit: B = B̄. Equal A_k: B = B̄ whatever λ."""
    factors, weights = cohort(3, 5)
    mean_b, mean_a, mean = means(factors, weights)
    assert np.abs((dense(ridge(factors, weights, 0.0)) - mean) @ mean_a.T).max() < 1e-5
    np.testing.assert_allclose(ridge(factors, weights, 1e9).B, mean_b, atol=1e-6)
    equal = [LowRank(x.B, factors[0].A) for x in factors]
    np.testing.assert_allclose(ridge(equal, weights, 0.0).B, mean_b, atol=1e-6)


@pytest.mark.parametrize("strength", [0.0, 0.01])
def test_ridge_leaves_components_that_nobody_has(strength):
    """Of rank 2, padded to 4: B's last columns stay zero, the first are those of rank 2 (with μ for r = 4)."""
    factors, weights = cohort(4, 3)
    found = ridge([pad(x, 4) for x in factors], weights, strength)
    assert not found.B[:, 2:].any()
    np.testing.assert_allclose(found.B[:, :2], ridge(factors, weights, strength / 2).B, rtol=1e-5, atol=1e-5)


def test_the_errors_of_one_random_cohort():
    """K 5, r 4, 30 x 40, in units of ‖Δ̄‖: the best of rank 4 .49, FLoRA-NA .57, LoRA-FAIR .70, FedIT .76."""
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.ones(5))
    A = [rng.normal(size=(4, 40)).astype(np.float32) for _ in range(5)]
    B = [rng.normal(size=(30, 4)).astype(np.float32) for _ in range(5)]
    factors = [LowRank(b, a) for b, a in zip(B, A, strict=True)]
    mean = means(factors, weights)[2]
    best = truncate(concatenate(list(zip(weights, factors, strict=True))), 4)
    found = [best, least_squares(factors, weights), ridge(factors, weights, 0.01), mean_factors(factors, weights)]
    errors = [error(dense(x), mean) for x in found]
    np.testing.assert_allclose(errors, [0.49, 0.57, 0.70, 0.76], atol=0.005)


@properties
@given(seeds, cohorts, st.integers(1, 4))
def test_sweeps_never_raise_the_error(seed, K, r):
    """The best error of rank r <= least squares <= the mean factors', and each sweep's at most the one before."""
    factors, weights = cohort(seed, K, r=r)
    mean = means(factors, weights)[2]
    errors = [error(dense(least_squares(factors, weights, sweeps)), mean) for sweeps in range(6)]
    assert errors[0] == pytest.approx(error(dense(mean_factors(factors, weights)), mean), abs=1e-6)
    assert all(after <= before + 1e-6 for before, after in pairwise(errors))
    best = truncate(concatenate(list(zip(weights, factors, strict=True))), r)
    assert error(dense(best), mean) <= errors[-1] + 1e-6


def test_least_squares_is_a_stationary_point():
    """Neither p nor q alone can do better: fitting dense products by lstsq finds no smaller error."""
    factors, weights = cohort(5, 4)
    mean = means(factors, weights)[2]
    found = least_squares(factors, weights, sweeps=500)
    for products in ([x.B @ found.A for x in factors], [found.B @ x.A for x in factors]):
        columns = np.stack([product.ravel() for product in products], axis=1).astype(np.float64)
        fitted = columns @ np.linalg.lstsq(columns, mean.ravel(), rcond=None)[0]
        assert error(dense(found), mean) <= error(fitted.reshape(mean.shape), mean) + 1e-5


def test_least_squares_is_exact_where_the_mean_factors_are():
    """One client; a common A; equal clients, where p and q are not unique and stay at w; and zeros."""
    factors, weights = cohort(6, 3)
    assert error(dense(least_squares(factors[:1])), dense(factors[0])) < 1e-6
    common = [LowRank(x.B, factors[0].A) for x in factors]
    assert error(dense(least_squares(common, weights)), means(common, weights)[2]) < 1e-6
    equal = least_squares([factors[0]] * 3, weights)
    np.testing.assert_allclose(equal.B, factors[0].B, rtol=1e-5)
    np.testing.assert_allclose(equal.A, factors[0].A, rtol=1e-5)
    assert not dense(least_squares([LowRank.zeros(4, 3, 2)] * 2)).any()


def test_a_component_without_a_gets_the_previous_one():
    """The product stays, whatever B has there; a component with an A stays as it is, also if its B is zero."""
    (x, old), _ = cohort(0, 2, r=3)
    x.A[1], x.B[:, 2] = 0, 0
    before = dense(x)
    found = keep_alive(x, old)
    np.testing.assert_array_equal(dense(found), before)
    np.testing.assert_array_equal(found.A, [x.A[0], old.A[1], x.A[2]])
    np.testing.assert_array_equal(found.B, np.column_stack([x.B[:, 0], np.zeros(8), np.zeros(8)]))
    assert found.A.dtype == found.B.dtype == np.float32
