"""Means of LoRA products: what averaging the factors of B_k A_k misses, and factors of one rank that miss less.

With weights w_k that sum to one, B̄ = Σ w_k B_k, Ā = Σ w_k A_k and Δ̄ = Σ w_k B_k A_k, the product of the mean factors is
in general not the mean product:

    Δ̄ − B̄ Ā = Σ_k w_k (B_k − B̄)(A_k − Ā)

FedEx-LoRA (arXiv 2410.09432) carries this difference along (`residual`), LoRA-FAIR (arXiv 2411.14961) changes B̄
(`ridge`), FLoRA-NA (arXiv 2509.26399) the weights of both means (`least_squares`). No product is ever dense, and all
sums are in float64. Factors that are averaged have one rank: `pad` fills up those that have fewer components.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedray.aggregation.low_rank import LowRank
from fedray.aggregation.points import Matrix, check_weights
from fedray.types import Vector

DEAD = 1e-6
"""A component whose singular value is at most this share of the largest one counts as zero."""


def pad(x: LowRank, rank: int) -> LowRank:
    """Return the same matrix with `rank` components, the last of them zero in both factors.

    Raises:
        ValueError: x has more components.
    """
    if x.rank > rank:
        raise ValueError(f"expected at most {rank} components, got {x.rank}")
    missing = (0, rank - x.rank)
    return LowRank(np.pad(x.B, ((0, 0), missing)), np.pad(x.A, (missing, (0, 0))))


def norm(x: LowRank) -> float:
    """Return ‖B A‖_F = √tr((BᵀB)(AAᵀ)), accurate to 1e-7 of ‖B‖ ‖A‖."""
    B, A = x.B.astype(np.float64), x.A.astype(np.float64)
    return float(np.sqrt(max(((B.T @ B) * (A @ A.T)).sum(), 0.0)))


def component_norms(x: LowRank) -> Matrix:
    """Return the norm of each component, the product of its two vectors' norms, [rank]: the singular values, if x is
    what `truncate` returned."""
    norms: Matrix = np.linalg.norm(x.B.astype(np.float64), axis=0) * np.linalg.norm(x.A.astype(np.float64), axis=1)
    return norms


def mean_factors(factors: Sequence[LowRank], weights: npt.ArrayLike | None = None) -> LowRank:
    """Return (B̄, Ā), the mean of the factors.

    Args:
        factors: one matrix per client, all of one shape and rank.
        weights: [K], >= 0, in any unit; None means equal weights.

    Raises:
        ValueError: no factors, factors of different shapes, or weights that are negative or sum to zero.
    """
    w, B, A = _stacked(factors, weights)
    return _low_rank(_sum(w, B), _sum(w, A))


def component_sums(factors: Sequence[LowRank], shares: Matrix) -> LowRank:
    """Return (Σ_k B_k diag(s_k), Σ_k diag(s_k) A_k): sums of the factors with shares of each component's own.

    Args:
        factors: one matrix per client, all of one shape and rank.
        shares: s, [K, rank].

    Raises:
        ValueError: no factors, factors of different shapes, or shares of another shape.
    """
    _, B, A = _stacked(factors, None)
    if shares.shape != A.shape[:2]:
        raise ValueError(f"expected shares of {A.shape[:2]} clients and components, got shape {shares.shape}")
    return _low_rank(np.einsum("kr,kir->ir", shares, B), np.einsum("kr,krj->rj", shares, A))


def residual(factors: Sequence[LowRank], weights: npt.ArrayLike | None = None) -> LowRank:
    """Return Δ̄ − B̄ Ā with (K − 1) r columns, as Σ_{k<K} w_k (B_k − B̄)(A_k − A_K).

    The last client's A can take the place of Ā because Σ_k w_k (B_k − B̄) = 0; its own term is then zero and needs no
    columns. Equal A_k give exact zeros.

    Args, Raises: as `mean_factors`.
    """
    w, B, A = _stacked(factors, weights)
    centre = _sum(w, B)
    terms = [(share * (b - centre), a - A[-1]) for share, b, a in zip(w[:-1], B[:-1], A[:-1], strict=True)]
    if not terms:
        return LowRank.zeros(*factors[0].shape)
    return _low_rank(np.hstack([b for b, _ in terms]), np.vstack([a for _, a in terms]))


def unit_rows(x: LowRank) -> LowRank:
    """Return the same matrix with rows of A of norm 1, or of norm 0 where they are zero; B has the rest."""
    norms = np.linalg.norm(x.A.astype(np.float64), axis=1)
    divisors = np.where(norms > 0, norms, 1)[:, np.newaxis]
    return _low_rank(x.B * norms, x.A / divisors)


def live(x: LowRank, draw: Vector) -> LowRank:
    """Return the same matrix with components that can be trained.

    `truncate` fills up with components that are zero in B and in A, whose gradients are zero for ever. Each component
    of singular value σ_i <= 1e-6 σ_1 gets the i-th row of `draw` as its A, and zeros as its B.

    Args:
        x: what `truncate` returned, possibly scaled since: σ_i is the product of the norms of its two vectors.
        draw: [rank, d_in].

    Raises:
        ValueError: `draw` has another shape than x.A.
    """
    if draw.shape != x.A.shape:
        raise ValueError(f"expected a draw of the shape of A, {x.A.shape}, got {draw.shape}")
    values = component_norms(x)
    dead = values <= DEAD * values.max(initial=0)
    return LowRank(np.where(dead, np.float32(0), x.B), np.where(dead[:, np.newaxis], draw, x.A))


def keep_alive(x: LowRank, previous: LowRank) -> LowRank:
    """Return the same matrix, where a component whose A is zero has the previous A, and zeros as its B.

    Factors that are filled up with zeros leave a component zero in A and in B if no client holds it. Its gradients
    would be zero for ever.

    Args:
        x: factors.
        previous: of the same shapes.
    """
    dead: npt.NDArray[np.bool_] = np.logical_not(x.A.any(axis=1))
    return LowRank(np.where(dead, np.float32(0), x.B), np.where(dead[:, np.newaxis], previous.A, x.A))


def ridge(factors: Sequence[LowRank], weights: npt.ArrayLike | None = None, strength: float = 0.0) -> LowRank:
    """Return (B̄ + X, Ā) with the X that minimises ‖(B̄ + X) Ā − Δ̄‖² + μ ‖X‖², μ = strength · tr(Ā Āᵀ) / r.

    X (Ā Āᵀ + μ I) = Σ_k w_k (B_k − B̄)(A_k − Ā) Āᵀ, of all solutions the smallest: where Ā has no component, B̄ stays.

    Args:
        strength: λ >= 0; the larger, the smaller is X.
        factors, weights: as in `mean_factors`.

    Raises:
        ValueError: as `mean_factors`.
    """
    w, B, A = _stacked(factors, weights)
    mean_b, mean_a = _sum(w, B), _sum(w, A)
    gram = mean_a @ mean_a.T
    missed = sum(
        (share * (b - mean_b) @ ((a - mean_a) @ mean_a.T) for share, b, a in zip(w, B, A, strict=True)),
        start=np.zeros_like(mean_b),
    )
    shifted = gram + strength * np.trace(gram) / len(gram) * np.eye(len(gram))
    inverse = np.linalg.pinv(shifted, rcond=DEAD**2, hermitian=True)
    return _low_rank(mean_b + missed @ inverse, mean_a)


def least_squares(
    factors: Sequence[LowRank], weights: npt.ArrayLike | None = None, sweeps: int = 20, damping: float = 1e-8
) -> LowRank:
    """Return (Σ_k q_k B_k, Σ_k p_k A_k) with p and q that minimise ‖B̂ Â − Δ̄‖ in turn, from p = q = w.

    With p fixed, B̂ Â is linear in q, and its normal equations are made of ⟨B_k Â, B_l Â⟩ and ⟨B_k Â, Δ̄⟩; likewise for
    p. Both need only B_kᵀB_l and A_kA_lᵀ, which are computed once. Each step is damped by its distance from the last
    iterate: the error never rises, and where p or q is not unique (equal clients) it stays where it is.

    Args:
        sweeps: how often q and then p is solved for.
        damping: in units of the mean of the normal matrix's diagonal.
        factors, weights: as in `mean_factors`.

    Raises:
        ValueError: as `mean_factors`.
    """
    w, B, A = _stacked(factors, weights)
    gram_b = np.einsum("kir,lis->klrs", B, B, optimize=True)
    gram_a = np.einsum("krj,lsj->klrs", A, A, optimize=True)
    p, q = w, w
    for _ in range(sweeps):
        q = _solved(q, gram_b, gram_a, p, w, damping)
        p = _solved(p, gram_a, gram_b, q, w, damping)
    return _low_rank(_sum(q, B), _sum(p, A))


def _solved(x: Matrix, mine: Matrix, others: Matrix, fixed: Matrix, w: Matrix, damping: float) -> Matrix:
    """Return the coefficients of one factor [K] that fit Δ̄ best, given those of the other factor.

    Args:
        x: the coefficients so far.
        mine, others: Gram blocks of this factor and of the other one, [K, K, r, r].
        fixed: the other factor's coefficients.
    """
    other = np.einsum("k,l,klrs->rs", fixed, fixed, others, optimize=True)
    normal = np.einsum("klrs,rs->kl", mine, other)
    wanted = np.einsum("klrs,l,m,mlrs->k", mine, w, fixed, others, optimize=True)
    scale = np.trace(normal) / len(normal)
    if scale == 0:
        return x
    step: Matrix = np.linalg.solve(normal + damping * scale * np.eye(len(normal)), wanted - normal @ x)
    return x + step


def _stacked(factors: Sequence[LowRank], weights: npt.ArrayLike | None) -> tuple[Matrix, Matrix, Matrix]:
    """Return w [K] that sums to one, B [K, d_out, r] and A [K, r, d_in], in float64."""
    shapes = {(x.B.shape, x.A.shape) for x in factors}
    if len(shapes) != 1:
        raise ValueError(f"expected at least one pair of factors and all of one shape, got {sorted(shapes)}")
    B = np.stack([x.B for x in factors]).astype(np.float64)
    A = np.stack([x.A for x in factors]).astype(np.float64)
    return check_weights(weights, len(factors)), B, A


def _sum(coefficients: Matrix, matrices: Matrix) -> Matrix:
    total: Matrix = np.einsum("k,kij->ij", coefficients, matrices)
    return total


def _low_rank(B: Matrix, A: Matrix) -> LowRank:
    return LowRank(B.astype(np.float32), A.astype(np.float32))
