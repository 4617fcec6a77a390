"""Sums of LoRA updates as factors: x = B A, never the dense [d_out, d_in] product where factors are smaller.

Serves FedHFT (arXiv 2510.14054): the cluster update ΔU_j of masked clients, its server states `full` and `rank_q`, the
truncated downlink Σ_j π_kj ΔW_j, and the Gram matrix for reclustering; and FLoRA's exact sum of stacked factors.
(B, A) and (B M⁻¹, M A) are the same update, so every comparison here is between products.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
from scipy.linalg import eigh

from fedray.aggregation.masks import Mask
from fedray.aggregation.points import Matrix
from fedray.types import Vector, state_type

MIN_MEMBERSHIP = 1e-3
"""A row whose Σ_k π_k m_k[i] is below this counts as held by no client: otherwise a vanishing share would get
a full-size update."""

Normalise = Literal["membership", "count"]


@state_type("LowRank", "fedray.aggregation.low_rank.LowRank")
@dataclass(frozen=True)
class LowRank:
    """The matrix B A.

    Attributes:
        B: float32 [d_out, q].
        A: float32 [q, d_in]; q = 0 is the zero matrix.

    Raises:
        ValueError: the factors do not fit together.
    """

    B: Vector
    A: Vector

    def __post_init__(self) -> None:
        if self.B.ndim != 2 or self.A.ndim != 2 or self.B.shape[1] != self.A.shape[0]:
            raise ValueError(f"expected B [d_out, q] and A [q, d_in], got {self.B.shape} and {self.A.shape}")

    @classmethod
    def zeros(cls, d_out: int, d_in: int, rank: int = 0) -> Self:
        """Return the zero matrix, held with `rank` columns of zeros."""
        return cls(np.zeros((d_out, rank), dtype=np.float32), np.zeros((rank, d_in), dtype=np.float32))

    @property
    def rank(self) -> int:
        """Columns held (q), an upper bound of the matrix's rank."""
        return int(self.B.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.B.shape[0], self.A.shape[1]

    def dense(self) -> Vector:
        """Return B A as [d_out, d_in], summed in float64."""
        return (self.B.astype(np.float64) @ self.A).astype(np.float32)


def concatenate(terms: Sequence[tuple[float | npt.NDArray[np.floating], LowRank]]) -> LowRank:
    """Return Σ_k diag(w_k) B_k A_k, held with Σ_k q_k columns.

    Args:
        terms: (weight, x) pairs; a weight is a number or one number per output row [d_out]. Weights go into B.

    Raises:
        ValueError: no terms, or terms of different shapes.
    """
    shapes = {x.shape for _, x in terms}
    if len(shapes) != 1:
        raise ValueError(f"expected at least one term and all of one shape [d_out, d_in], got shapes {sorted(shapes)}")
    rows = [np.multiply(np.asarray(weight, dtype=np.float64).reshape(-1, 1), x.B) for weight, x in terms]
    return LowRank(np.hstack(rows).astype(np.float32), np.vstack([x.A for _, x in terms]))


def truncate(x: LowRank, rank: int) -> LowRank:
    """Return the best approximation of the given rank, with exactly `rank` columns (zeros where x has lower rank).

    Factors are balanced (the roots of the singular values on both sides) and signed so that the entry of largest
    magnitude in each column of B is positive. Cost: O((d_out + d_in) q² + q³), never more than a dense SVD. What is
    lost exceeds the least possible by no more than 1e-7 of the largest singular value.

    Raises:
        ValueError: rank < 0.
    """
    if rank < 0:
        raise ValueError(f"expected rank >= 0, got {rank}")
    if not min(rank, *x.shape, x.rank):
        return LowRank.zeros(*x.shape, rank)
    B, A = x.B.astype(np.float64), x.A.astype(np.float64)
    r_b, r_a = _upper(B), _upper(A.T)
    core = r_b @ r_a.T  # of the whole, with orthonormal matrices on both sides that are never formed
    size = core.shape[1]
    _, right = eigh(core.T @ core, subset_by_index=(max(size - rank, 0), size - 1))
    basis, _ = np.linalg.qr(B @ (r_a.T @ right))  # of the columns that B A has along its first right singular vectors
    u, s, vt = np.linalg.svd((basis.T @ B) @ A, full_matrices=False)
    return _balanced(basis @ u, s, vt, len(s), rank)


def compress(x: LowRank) -> LowRank:
    """Return the same matrix with at most min(d_out, d_in, q) columns, numerically zero singular values dropped."""
    u, s, vt = _svd(x)
    kept = int((s > s.max(initial=0) * max(x.shape) * np.finfo(np.float64).eps).sum())
    return _balanced(u, s, vt, kept, kept)


def relative_error(x: LowRank, y: LowRank) -> float:
    """Return ‖x − y‖_F / ‖y‖_F from the factors (0 when both are zero, infinity when only y is).

    The difference is taken in the small core, before squaring: exact to float64 rounding, unlike ‖x‖² − 2⟨x, y⟩ + ‖y‖².

    Raises:
        ValueError: the shapes differ.
    """
    difference = float(np.linalg.norm(_core(concatenate([(1.0, x), (-1.0, y)]))[1]))
    size = float(np.linalg.norm(_core(y)[1]))
    if size == 0:
        return 0.0 if difference == 0 else float("inf")
    return difference / size


def cluster_update(
    factors: Sequence[LowRank], memberships: npt.ArrayLike, masks: Sequence[Mask], normalise: Normalise = "membership"
) -> LowRank:
    """Return FedHFT's ΔU_j for one target matrix: row i is Σ_k π_k m_k[i] (B_k A_k)[i,:] / N_i, and 0 where N_i is 0.

    Clients that contribute to no row add no columns: the update of an empty cluster has rank 0.

    Args:
        factors: one update per client of the cohort.
        memberships: π [K], client k's share in this cluster.
        masks: m_k [d_out] per client, True where the client holds the row.
        normalise: `membership`: N_i = Σ_k π_k m_k[i], below 1e-3 counted as 0; `count`: N_i = Σ_k m_k[i] (released
            code).

    Raises:
        ValueError: no factors, or numbers of factors, memberships and masks (or their rows) that do not agree.
    """
    pi, held = np.asarray(memberships, dtype=np.float64), np.asarray(masks, dtype=np.float64)
    if not factors or pi.shape != (len(factors),) or held.shape != (len(factors), factors[0].shape[0]):
        raise ValueError(
            f"expected K factors with memberships [K] and masks [K, d_out], got {len(factors)} factors, "
            f"memberships {pi.shape} and masks {held.shape}"
        )
    weights = pi[:, np.newaxis] * held
    norm = weights.sum(axis=0) if normalise == "membership" else held.sum(axis=0)
    counted = norm >= (MIN_MEMBERSHIP if normalise == "membership" else 1)
    shares = np.divide(weights, norm, out=np.zeros_like(weights), where=counted)
    terms = [(share, x) for share, x in zip(shares, factors, strict=True) if share.any()]
    return concatenate(terms) if terms else LowRank.zeros(*factors[0].shape)


def gram(clients: Sequence[Sequence[LowRank]]) -> Matrix:
    """Return [K, K] in float64: G_kl = Σ_targets ⟨x_k, x_l⟩. Not centred: see `clustering.centre_gram`.

    Args:
        clients: for each client its updates, one per target matrix, in the same order; ranks may differ.

    Raises:
        ValueError: clients with different numbers of targets.
    """
    result = np.zeros((len(clients), len(clients)))
    for target in zip(*clients, strict=True):
        B = np.hstack([x.B for x in target]).astype(np.float64)
        A = np.vstack([x.A for x in target]).astype(np.float64)
        owner = np.repeat(np.arange(len(target)), [x.rank for x in target])
        for k in range(len(target)):
            mine = owner == k
            products = ((B[:, mine].T @ B) * (A[mine] @ A.T)).sum(axis=0)
            result[k] += np.bincount(owner, weights=products, minlength=len(target))
    return (result + result.T) / 2


def _upper(matrix: Matrix) -> Matrix:
    """Return the upper triangular factor of its QR decomposition."""
    r: Matrix = np.linalg.qr(matrix, mode="r")  # type: ignore[assignment]  # numpy's stubs know the pair only
    return r


def _core(x: LowRank) -> tuple[Matrix, Matrix, Matrix]:
    """Return (Q_B, C, Q_A) with B A = Q_B C Q_Aᵀ, orthonormal columns, C at most [min(d_out, q), min(d_in, q)]."""
    q_b, r_b = np.linalg.qr(x.B.astype(np.float64))
    q_a, r_a = np.linalg.qr(x.A.T.astype(np.float64))
    return q_b, r_b @ r_a.T, q_a


def _svd(x: LowRank) -> tuple[Matrix, Matrix, Matrix]:
    """Return (U, s, Vᵀ) of B A with min(d_out, d_in, q) singular values, largest first."""
    q_b, core, q_a = _core(x)
    u, s, vt = np.linalg.svd(core, full_matrices=False)
    return q_b @ u, s, vt @ q_a.T


def _balanced(u: Matrix, s: Matrix, vt: Matrix, kept: int, rank: int) -> LowRank:
    """Return U √S and √S Vᵀ of the first `kept` components, filled up with zeros to `rank` columns."""
    result = LowRank.zeros(u.shape[0], vt.shape[1], rank)
    if kept:
        largest = np.abs(u[:, :kept]).argmax(axis=0)
        scale = np.sqrt(s[:kept]) * np.where(u[largest, np.arange(kept)] < 0, -1, 1)
        result.B[:, :kept] = u[:, :kept] * scale
        result.A[:kept] = scale[:, np.newaxis] * vt[:kept]
    return result
