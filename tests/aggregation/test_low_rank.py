import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedray.aggregation.low_rank import (
    LowRank,
    cluster_update,
    compress,
    concatenate,
    gram,
    relative_error,
    truncate,
)

deterministic = settings(deadline=None, derandomize=True, max_examples=40)
seeds = st.integers(0, 10**6)
sizes = st.integers(1, 9)


def random_low_rank(rng, d_out, d_in, q):
    return LowRank(rng.normal(size=(d_out, q)).astype(np.float32), rng.normal(size=(q, d_in)).astype(np.float32))


def product(x):
    """The dense matrix in float64, independent of LowRank's own methods."""
    return x.B.astype(np.float64) @ x.A.astype(np.float64)


def assert_same_product(x, dense, rtol=1e-6):
    assert np.linalg.norm(product(x) - dense) <= rtol * np.linalg.norm(dense) + 1e-12


def test_parts_of_a_low_rank_matrix():
    """[[1], [2]] · [[3, 4, 5]] = [[3, 4, 5], [6, 8, 10]]."""
    x = LowRank(np.float32([[1], [2]]), np.float32([[3, 4, 5]]))
    assert (x.rank, x.shape) == (1, (2, 3))
    assert x.dense().tolist() == [[3, 4, 5], [6, 8, 10]]
    assert x.dense().dtype == np.float32
    zero = LowRank.zeros(2, 3, rank=4)
    assert (zero.rank, zero.shape) == (4, (2, 3))
    assert not zero.dense().any()


def test_factors_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"B \[d_out, q\] and A \[q, d_in\]"):
        LowRank(np.zeros((2, 3), dtype=np.float32), np.zeros((2, 3), dtype=np.float32))


@deterministic
@given(seeds, sizes, sizes, st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_a_concatenation_is_the_weighted_sum(seed, d_out, d_in, ranks):
    rng = np.random.default_rng(seed)
    parts = [random_low_rank(rng, d_out, d_in, q) for q in ranks]
    numbers, rows = rng.normal(size=len(ranks)), rng.normal(size=(len(ranks), d_out))
    total = concatenate([(float(w), x) for w, x in zip(numbers, parts, strict=True)])
    assert total.rank == sum(ranks)
    np.testing.assert_allclose(
        product(total), sum(w * product(x) for w, x in zip(numbers, parts, strict=True)), atol=1e-5
    )
    by_row = concatenate(list(zip(rows, parts, strict=True)))
    expected = sum(np.diag(w) @ product(x) for w, x in zip(rows, parts, strict=True))
    np.testing.assert_allclose(product(by_row), expected, atol=1e-5)
    assert by_row.B.dtype == by_row.A.dtype == np.float32


def test_terms_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match="all of one shape"):
        concatenate([(1.0, LowRank.zeros(2, 3)), (1.0, LowRank.zeros(3, 3))])
    with pytest.raises(ValueError, match="at least one term"):
        concatenate([])


@deterministic
@given(seeds, sizes, sizes, st.integers(0, 14), st.integers(0, 12))
def test_truncation_is_the_dense_svd_cut_off(seed, d_out, d_in, q, rank):
    """Eckart and Young: the best approximation keeps the largest singular values. q may exceed d_out and d_in."""
    x = random_low_rank(np.random.default_rng(seed), d_out, d_in, q)
    u, s, vt = np.linalg.svd(product(x), full_matrices=False)
    cut = truncate(x, rank)
    assert cut.B.shape == (d_out, rank)
    assert cut.A.shape == (rank, d_in)
    np.testing.assert_allclose(product(cut), (u[:, :rank] * s[:rank]) @ vt[:rank], atol=2e-6 * s.max(initial=0))


def test_truncation_by_hand():
    """diag(9, 4, 1) cut to rank 2 is diag(9, 4, 0); balanced and with positive largest entries, both factors are
    diag(3, 2)."""
    x = LowRank(np.diag(np.float32([-1, 2, -1])), np.diag(np.float32([-9, 2, -1])))
    cut = truncate(x, 2)
    np.testing.assert_allclose(cut.B, [[3, 0], [0, 2], [0, 0]], atol=1e-6)
    np.testing.assert_allclose(cut.A, [[3, 0, 0], [0, 2, 0]], atol=1e-6)


@deterministic
@given(seeds)
def test_truncated_factors_are_balanced_signed_and_padded(seed):
    rng = np.random.default_rng(seed)
    cut = truncate(random_low_rank(rng, 8, 6, 3), 5)
    np.testing.assert_allclose(cut.B.T @ cut.B, cut.A @ cut.A.T, atol=1e-4)
    np.testing.assert_array_equal(cut.B[:, 3:], 0)
    np.testing.assert_array_equal(cut.A[3:], 0)
    assert (cut.B[np.abs(cut.B[:, :3]).argmax(axis=0), range(3)] > 0).all()


@deterministic
@given(seeds)
def test_truncation_sees_the_product_not_the_factors(seed):
    """(B M, M⁻¹ A) is the same update as (B, A)."""
    rng = np.random.default_rng(seed)
    x = random_low_rank(rng, 9, 7, 3)
    M = np.linalg.qr(rng.normal(size=(3, 3)))[0] * [0.5, 2, 4]
    y = LowRank((x.B @ M).astype(np.float32), (np.linalg.inv(M) @ x.A).astype(np.float32))
    assert_same_product(truncate(y, 2), product(truncate(x, 2)), rtol=1e-5)


def test_a_negative_rank_is_refused():
    with pytest.raises(ValueError, match="rank >= 0"):
        truncate(LowRank.zeros(2, 2), -1)


@deterministic
@given(seeds, sizes, sizes, st.integers(0, 14))
def test_compression_loses_nothing(seed, d_out, d_in, q):
    x = random_low_rank(np.random.default_rng(seed), d_out, d_in, q)
    small = compress(x)
    assert small.rank <= min(d_out, d_in, q)
    assert_same_product(small, product(x))


def test_compression_drops_what_is_numerically_zero():
    """x − ½ x + 3 x is held with nine columns and has rank three; x − x has rank zero."""
    x = random_low_rank(np.random.default_rng(0), 40, 30, 3)
    assert compress(concatenate([(1.0, x), (-0.5, x), (3.0, x)])).rank == 3
    assert compress(LowRank.zeros(4, 5, rank=3)).rank == 0


def test_a_long_sum_stays_exact_under_compression():
    """Server state `full`: forty rounds of rank 2 into a 12 × 10 matrix, compressed each time, against a dense sum."""
    rng = np.random.default_rng(1)
    state, dense = LowRank.zeros(12, 10), np.zeros((12, 10))
    for _ in range(40):
        update = random_low_rank(rng, 12, 10, 2)
        state, dense = compress(concatenate([(1.0, state), (1.0, update)])), dense + product(update)
    assert state.rank == 10
    assert_same_product(state, dense, rtol=1e-5)


@deterministic
@given(seeds, sizes, sizes, st.integers(0, 4), st.integers(1, 4))
def test_the_relative_error_is_that_of_the_products(seed, d_out, d_in, p, q):
    rng = np.random.default_rng(seed)
    x, y = random_low_rank(rng, d_out, d_in, p), random_low_rank(rng, d_out, d_in, q)
    expected = np.linalg.norm(product(x) - product(y)) / np.linalg.norm(product(y))
    assert relative_error(x, y) == pytest.approx(expected, rel=1e-9)


def test_small_relative_errors_are_resolved():
    """Adding 2⁻²⁰ of itself (exact in float32) is a relative error of 2⁻²⁰; squares of norms would see only rounding
    from 1e-8 on."""
    y = LowRank(np.float32([[1], [2], [4]]), np.float32([[8, -1]]))
    assert relative_error(LowRank(y.B * np.float32(1 + 2**-20), y.A), y) == pytest.approx(2**-20, rel=1e-6)
    assert relative_error(y, y) < 1e-15
    zero = LowRank.zeros(3, 2)
    assert relative_error(zero, zero) == 0
    assert relative_error(y, zero) == float("inf")
    assert relative_error(zero, y) == pytest.approx(1)


def test_cluster_update_by_hand():
    """One input column. Client 0 holds rows 0 and 1 with (2, 4), client 1 rows 1 and 2 with (8, 10), nobody row 3;
    memberships ¾ and ¼.
    membership: row 0 = 2, row 1 = ¾·4 + ¼·8 = 5, row 2 = 10, row 3 = 0.
    count: row 0 = ¾·2 = 1.5, row 1 = (¾·4 + ¼·8)/2 = 2.5, row 2 = ¼·10 = 2.5, row 3 = 0."""
    A = np.float32([[1]])
    factors = [LowRank(np.float32([[2], [4], [6], [7]]), A), LowRank(np.float32([[6], [8], [10], [7]]), A)]
    masks = [np.array([True, True, False, False]), np.array([False, True, True, False])]
    assert cluster_update(factors, [0.75, 0.25], masks).dense()[:, 0].tolist() == [2, 5, 10, 0]
    assert cluster_update(factors, [0.75, 0.25], masks, "count").dense()[:, 0].tolist() == [1.5, 2.5, 2.5, 0]


@deterministic
@given(seeds, st.sampled_from(["membership", "count"]))
def test_cluster_update_against_the_dense_formula(seed, normalise):
    rng = np.random.default_rng(seed)
    factors = [random_low_rank(rng, 6, 5, q) for q in (2, 3, 1, 2)]
    pi, masks = rng.uniform(0.01, 1, 4), rng.random((4, 6)) < 0.4
    expected = np.zeros((6, 5))
    for i in range(6):
        holders = [k for k in range(4) if masks[k, i]]
        norm = sum(pi[k] for k in holders) if normalise == "membership" else len(holders)
        for k in holders:
            expected[i] += pi[k] * product(factors[k])[i] / norm
    update = cluster_update(factors, pi, list(masks), normalise)
    np.testing.assert_allclose(product(update), expected, atol=1e-5)
    np.testing.assert_array_equal(update.B[~masks.any(axis=0)], 0)


def test_a_vanishing_membership_counts_as_nobody():
    """Below the threshold of 1e-3 nothing arrives; above it the client's whole update, being the only one."""
    x = random_low_rank(np.random.default_rng(0), 3, 4, 2)
    everything = [np.ones(3, dtype=bool)]
    assert cluster_update([x], [0.9e-3], everything).rank == 0
    assert_same_product(cluster_update([x], [1.1e-3], everything), product(x))
    assert_same_product(cluster_update([x], [0.9e-3], everything, "count"), 0.9e-3 * product(x))


def test_an_empty_cluster_gets_a_zero_update_and_no_columns():
    factors = [random_low_rank(np.random.default_rng(0), 3, 4, 2)] * 2
    update = cluster_update(factors, [0, 0], [np.ones(3, dtype=bool)] * 2)
    assert (update.shape, update.rank) == ((3, 4), 0)
    one_of_two = cluster_update(factors, [0, 1], [np.ones(3, dtype=bool)] * 2)
    assert one_of_two.rank == 2


def test_cluster_update_refuses_numbers_that_do_not_agree():
    x = LowRank.zeros(3, 4)
    with pytest.raises(ValueError, match="expected K factors"):
        cluster_update([x, x], [1.0], [np.ones(3, dtype=bool)] * 2)
    with pytest.raises(ValueError, match="expected K factors"):
        cluster_update([x], [1.0], [np.ones(4, dtype=bool)])
    with pytest.raises(ValueError, match="expected K factors"):
        cluster_update([], [], [])


@deterministic
@given(seeds)
def test_gram_entries_are_those_of_the_products(seed):
    """Ranks differ between clients (tiers) and one client holds nothing; two targets of different shapes are summed."""
    rng = np.random.default_rng(seed)
    clients = [[random_low_rank(rng, 7, 5, q), random_low_rank(rng, 4, 6, q + 1)] for q in (2, 0, 3, 1)]
    flat = np.array([np.concatenate([product(x).ravel() for x in client]) for client in clients])
    result = gram(clients)
    np.testing.assert_allclose(result, flat @ flat.T, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(result, result.T)


def test_gram_needs_the_same_targets_for_everyone():
    x = LowRank.zeros(2, 3, 1)
    with pytest.raises(ValueError, match="zip"):
        gram([[x, x], [x]])
