"""Restores orthonormal rows and aligns gauges, as averaging LoReFT's R requires (FedReFT, arXiv 2508.20295).

Averages and medians of matrices with orthonormal rows do not have orthonormal rows; the polar factor U Vᵀ of the
singular value decomposition U S Vᵀ is the nearest matrix that does (Fan and Hoffman 1955). (Q R, Q W, Q b) is the same
LoReFT function for every orthogonal Q; Procrustes' Q (Schönemann 1966) brings one client's parameters closest to
another's before they are averaged, which goes beyond the paper (`align: procrustes`).
"""

import numpy as np

from fedray.aggregation.points import Matrix
from fedray.types import Vector


def retract(matrix: Vector) -> Vector:
    """Return the nearest matrix with orthonormal rows, in the Frobenius norm.

    Args:
        matrix: [..., r, d] with r <= d.

    Returns:
        The same shape, R Rᵀ = I to float32 rounding. Where the input has rank below r the nearest matrix is not unique:
        one of them is returned, and its rows are orthonormal too.

    Raises:
        ValueError: r > d, or a value is not finite.
    """
    if matrix.ndim < 2 or matrix.shape[-2] > matrix.shape[-1]:
        raise ValueError(f"expected [..., r, d] with r <= d, got shape {matrix.shape}")
    return _polar_factor(matrix.astype(np.float64)).astype(np.float32)


def procrustes_rotation(source: Vector, target: Vector) -> Matrix:
    """Return the orthogonal Q that minimises ‖Q source − target‖_F.

    Args:
        source: [..., r, m], for LoReFT [R | W | b] side by side (m = 2d + 1) or R alone (m = d).
        target: the same shape.

    Returns:
        Q [..., r, r] in float64. Q source is the aligned client: apply the same Q to its R, W and b.

    Raises:
        ValueError: the shapes differ, or a value is not finite.
    """
    if source.shape != target.shape or source.ndim < 2:
        raise ValueError(f"expected two arrays of one shape [..., r, m], got {source.shape} and {target.shape}")
    return _polar_factor(target.astype(np.float64) @ np.swapaxes(source, -1, -2).astype(np.float64))


def _polar_factor(matrix: Matrix) -> Matrix:
    if not np.isfinite(matrix).all():
        raise ValueError("expected finite values, got NaN or infinity; leave this client out before aggregating")
    u, _, vt = np.linalg.svd(matrix, full_matrices=False)
    factor: Matrix = u @ vt
    return factor
