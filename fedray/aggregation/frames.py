"""Orthonormal frames of a low-rank matrix (Fed-SB, arXiv 2502.15436): U, Vᵀ and Σ of x = U Σ Vᵀ."""

import numpy as np

from fedray.aggregation.low_rank import LowRank
from fedray.aggregation.points import Matrix
from fedray.aggregation.products import DEAD, component_norms
from fedray.types import Vector


def frame(x: LowRank, draw: LowRank) -> tuple[LowRank, Vector]:
    """Return (U, Vᵀ) and the singular values [r]. Directions that x leaves open are those that a draw adds to them;
    their singular values are 0.

    Args:
        x: what `truncate` returned: balanced, U √Σ and √Σ Vᵀ, with zeros where it has lower rank.
        draw: linearly independent columns and rows, in the shapes of x.
    """
    values = component_norms(x)
    alive = values > DEAD * values.max(initial=0)
    left, right = _directions(x.B[:, alive], draw.B), _directions(x.A[alive].T, draw.A.T)
    return LowRank(left, right.T), np.where(alive, values, 0).astype(np.float32)


def _directions(columns: Matrix | Vector, draw: Vector) -> Vector:
    """Return the directions of orthogonal columns, and then of what the draw adds to them; as many as the draw has."""
    q, r = np.linalg.qr(np.hstack([columns, draw]).astype(np.float64))
    return np.asarray((q * np.where(np.diag(r) < 0, -1, 1))[:, : draw.shape[1]], np.float32)
