import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import orthogonal_procrustes

from fedray.aggregation.stiefel import procrustes_rotation, retract

deterministic = settings(deadline=None, derandomize=True, max_examples=40)
seeds = st.integers(0, 10**6)


def orthonormal_rows(rng, r, d):
    return np.linalg.qr(rng.normal(size=(d, r)))[0].T


def assert_orthonormal(R):
    gram = R.astype(np.float64) @ np.swapaxes(R, -1, -2)
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(R.shape[-2]), gram.shape), atol=1e-6)


@deterministic
@given(seeds, st.integers(1, 8), st.integers(0, 24), st.sampled_from([1e-6, 1.0, 1e6]))
def test_rows_become_orthonormal_and_stay_as_they_are(seed, r, extra, scale):
    matrix = (scale * np.random.default_rng(seed).normal(size=(r, r + extra))).astype(np.float32)
    R = retract(matrix)
    assert R.dtype == np.float32
    assert_orthonormal(R)
    np.testing.assert_allclose(retract(R), R, atol=3e-7)


def test_by_hand():
    """Rows (3, 0, 4) and (0, 2, 0) are orthogonal, of lengths 5 and 2: nearest are the unit vectors along them."""
    matrix = np.array([[3, 0, 4], [0, 2, 0]], dtype=np.float32)
    np.testing.assert_allclose(retract(matrix), [[0.6, 0, 0.8], [0, 1, 0]], atol=1e-7)


@deterministic
@given(seeds)
def test_no_other_orthonormal_matrix_is_nearer(seed):
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(3, 7)).astype(np.float32)
    nearest = np.linalg.norm(matrix - retract(matrix))
    for size in (1e-2, 0.1, 1.0):
        other = retract((retract(matrix) + size * rng.normal(size=(3, 7))).astype(np.float32))
        assert nearest <= np.linalg.norm(matrix - other) + 1e-6


@pytest.mark.parametrize("matrix", [np.zeros((2, 5)), np.ones((3, 4)), np.diag([1.0, 0, 0])])
def test_a_rank_deficient_matrix_still_gives_orthonormal_rows(matrix):
    assert_orthonormal(retract(matrix.astype(np.float32)))


def test_averaged_rotations_have_lost_their_length_and_get_it_back():
    """Two orthonormal matrices of orthogonal row spaces average to rows of length 1/√2."""
    first, second = np.eye(2, 4, dtype=np.float32), np.eye(2, 4, 2, dtype=np.float32)
    mean = (first + second) / 2
    assert np.linalg.norm(mean, axis=1) == pytest.approx([0.5**0.5] * 2)
    np.testing.assert_allclose(retract(mean), mean * 2**0.5, atol=1e-6)


def test_a_batch_is_done_matrix_by_matrix():
    batch = np.random.default_rng(0).normal(size=(2, 3, 4, 9)).astype(np.float32)
    result = retract(batch)
    assert result.shape == batch.shape
    for i in np.ndindex(2, 3):
        np.testing.assert_allclose(result[i], retract(batch[i]), atol=1e-7)


@pytest.mark.parametrize("shape", [(5, 3), (4,)])
def test_more_rows_than_columns_cannot_be_orthonormal(shape):
    with pytest.raises(ValueError, match="r <= d"):
        retract(np.ones(shape, dtype=np.float32))


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="finite"):
        retract(np.full((2, 3), np.nan, dtype=np.float32))


def test_a_quarter_turn_by_hand():
    """Rows (e1, e2) become rows (e2, −e1) by Q = [[0, 1], [−1, 0]]."""
    source = np.eye(2, 3, dtype=np.float32)
    target = np.array([[0, 1, 0], [-1, 0, 0]], dtype=np.float32)
    np.testing.assert_allclose(procrustes_rotation(source, target), [[0, 1], [-1, 0]], atol=1e-12)


@deterministic
@given(seeds, st.integers(1, 6))
def test_against_scipy(seed, r):
    """scipy minimises ‖A Ω − B‖ over Ω: with A = sourceᵀ and B = targetᵀ that is Q = Ωᵀ."""
    rng = np.random.default_rng(seed)
    source, target = rng.normal(size=(2, r, 11)).astype(np.float32)
    omega, _ = orthogonal_procrustes(source.T.astype(np.float64), target.T.astype(np.float64))
    Q = procrustes_rotation(source, target)
    np.testing.assert_allclose(Q, omega.T, atol=1e-6)
    np.testing.assert_allclose(Q @ Q.T, np.eye(r), atol=1e-12)


def test_alignment_undoes_the_gauge_and_keeps_the_function():
    """(QR, QW, Qb) is the same LoReFT as (R, W, b): aligned on [R | W | b] its parameters come back, and for any h
    the edit Rᵀ(W h + b − R h) never changed."""
    rng = np.random.default_rng(5)
    r, d = 4, 10
    R, W, b = orthonormal_rows(rng, r, d), rng.normal(size=(r, d)), rng.normal(size=(r, 1))
    phi = np.hstack([R, W, b])
    turned = orthonormal_rows(rng, r, r) @ phi
    Q = procrustes_rotation(turned.astype(np.float32), phi.astype(np.float32))
    np.testing.assert_allclose(Q @ turned, phi, atol=1e-6)

    def edit(phi, h):
        R, W, b = phi[:, :d], phi[:, d:-1], phi[:, -1]
        return R.T @ (W @ h + b - R @ h)

    h = rng.normal(size=d)
    np.testing.assert_allclose(edit(turned, h), edit(phi, h), atol=1e-12)


def test_procrustes_refuses_different_shapes():
    with pytest.raises(ValueError, match=r"one shape \[..., r, m\]"):
        procrustes_rotation(np.ones((2, 3), dtype=np.float32), np.ones((2, 4), dtype=np.float32))
