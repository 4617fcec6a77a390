import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedray.aggregation.masks import energy, pack, random_rows, row_count, top_rows, unpack

deterministic = settings(deadline=None, derandomize=True, max_examples=60)
ratios = st.fractions(Fraction(1, 100), 1, max_denominator=100)


@deterministic
@given(st.integers(1, 5000), ratios)
def test_exactly_the_ceiling_in_exact_arithmetic(d_out, ratio):
    assert row_count(d_out, float(ratio)) == math.ceil(ratio * d_out)


def test_rounding_adds_no_row():
    """0.07 · 100 is 7.000000000000001 in float64 and 0.1 · 3 · 10 is 3.0000000000000004: 7 and 3 rows, not 8 and 4."""
    assert math.ceil(0.07 * 100) == 8
    assert row_count(100, 0.07) == 7
    assert row_count(10, 0.1 * 3) == 3
    assert row_count(5, 1e-12) == 1


@pytest.mark.parametrize("ratio", [0, -0.5, 1.01, np.nan])
def test_impossible_ratios_are_refused(ratio):
    with pytest.raises(ValueError, match=r"in \(0, 1\]"):
        row_count(10, ratio)


def test_the_largest_rows_by_hand():
    """Half of 5 rows is 3: importances 9 and 4, then of the two 2s the one with the lower index."""
    assert np.flatnonzero(top_rows(np.array([1.0, 2, 9, 2, 4]), 0.5)).tolist() == [1, 2, 4]


def test_ties_go_to_the_lower_index():
    assert np.flatnonzero(top_rows(np.zeros(100), 0.25)).tolist() == list(range(25))


@deterministic
@given(arrays(np.float32, st.integers(1, 40), elements=st.floats(-10, 10, width=32)), ratios)
def test_no_row_left_out_is_more_important_than_one_kept(importance, ratio):
    mask = top_rows(importance, float(ratio))
    assert mask.dtype == np.bool_
    assert mask.sum() == math.ceil(ratio * len(importance))
    if not mask.all():
        assert importance[mask].min() >= importance[~mask].max()


def test_an_importance_that_is_nan_is_refused():
    with pytest.raises(ValueError, match="no NaN"):
        top_rows(np.array([1, np.nan]), 0.5)


def test_random_rows_are_exact_in_number_and_reach_every_row():
    """12 of 30 rows, 60 draws: a row is missed by all of them with probability 0.6⁶⁰ < 1e-13."""
    draws = [random_rows(30, 0.4, np.random.default_rng(seed)) for seed in range(60)]
    assert {int(mask.sum()) for mask in draws} == {12}
    assert np.any(draws, axis=0).all()
    assert np.array_equal(draws[3], random_rows(30, 0.4, np.random.default_rng(3)))


@deterministic
@given(arrays(np.bool_, st.integers(0, 70)))
def test_a_bitset_has_one_bit_per_row_and_comes_back(mask):
    bits = pack(mask)
    assert bits.dtype == np.uint8
    assert bits.nbytes == math.ceil(len(mask) / 8)
    restored = unpack(bits, len(mask))
    assert restored.dtype == np.bool_
    assert np.array_equal(restored, mask)


def test_a_bitset_of_another_length_is_refused():
    with pytest.raises(ValueError, match="expected 2 bytes for 9 rows"):
        unpack(np.zeros(1, dtype=np.uint8), 9)


@deterministic
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_energy_is_the_squared_row_norm_of_the_product(seed, q):
    rng = np.random.default_rng(seed)
    B, A = rng.normal(size=(7, q)).astype(np.float32), rng.normal(size=(q, 9)).astype(np.float32)
    dense = np.square(B.astype(np.float64) @ A).sum(axis=1)
    np.testing.assert_allclose(energy(B, A), dense, rtol=1e-10)


def test_energy_refuses_factors_that_do_not_fit():
    with pytest.raises(ValueError, match=r"B \[d_out, q\]"):
        energy(np.ones((3, 2), dtype=np.float32), np.ones((1, 4), dtype=np.float32))
