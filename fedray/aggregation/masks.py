"""Row masks: which output rows of a LoRA update a client can hold (FedHFT, arXiv 2510.14054).

Client k keeps the ⌈ρ_k · d_out⌉ most important rows of each target matrix; a mask travels as a bitset.
"""

import math

import numpy as np
import numpy.typing as npt

from fedray.aggregation.points import Matrix
from fedray.types import Vector

Mask = npt.NDArray[np.bool_]
"""[d_out], True where the row is kept."""


def row_count(d_out: int, ratio: float) -> int:
    """Return ⌈ratio · d_out⌉, at least 1; the product's rounding is forgiven (0.07 · 100 = 7.000…1 is 7 rows).

    Raises:
        ValueError: ratio is not in (0, 1].
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"expected a mask ratio in (0, 1], got {ratio}; set the tier's mask_ratio")
    return max(1, math.ceil(ratio * d_out - 1e-9))


def top_rows(importance: npt.NDArray[np.floating], ratio: float) -> Mask:
    """Return the mask [d_out] of exactly `row_count` rows with the largest importance, ties to the lower index.

    Args:
        importance: [d_out], in any unit.
        ratio: ρ_k.

    Raises:
        ValueError: an importance is NaN, or ratio is not in (0, 1].
    """
    if importance.ndim != 1 or np.isnan(importance).any():
        raise ValueError(f"expected one importance per row and no NaN, got shape {importance.shape}: {importance}")
    order = np.argsort(-importance, kind="stable")
    return _mask(order[: row_count(len(importance), ratio)], len(importance))


def random_rows(d_out: int, ratio: float, rng: np.random.Generator) -> Mask:
    """Return the mask [d_out] of `row_count` rows drawn without replacement (round 0 of timing `pre`).

    Raises:
        ValueError: ratio is not in (0, 1].
    """
    return _mask(rng.choice(d_out, size=row_count(d_out, ratio), replace=False), d_out)


def energy(B: Vector, A: Vector) -> Matrix:
    """Return ‖(B A)_{i,:}‖² as [d_out] in float64: row importance in the authors' released code.

    It is the diagonal of B (A Aᵀ) Bᵀ, so B A is never formed.

    Args:
        B: [d_out, q].
        A: [q, d_in].

    Raises:
        ValueError: the factors' ranks differ.
    """
    if B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0]:
        raise ValueError(f"expected B [d_out, q] and A [q, d_in], got {B.shape} and {A.shape}")
    wide_b, wide_a = B.astype(np.float64), A.astype(np.float64)
    norms: Matrix = ((wide_b @ (wide_a @ wide_a.T)) * wide_b).sum(axis=1)
    return norms


def pack(mask: Mask) -> npt.NDArray[np.uint8]:
    """Return the mask [d_out] as a bitset of ⌈d_out / 8⌉ bytes, first row in the highest bit."""
    return np.packbits(mask)


def unpack(bits: npt.NDArray[np.uint8], d_out: int) -> Mask:
    """Return the mask [d_out] of a bitset made by `pack`.

    Raises:
        ValueError: the bitset does not have ⌈d_out / 8⌉ bytes.
    """
    if bits.shape != (-(-d_out // 8),):
        raise ValueError(f"expected {-(-d_out // 8)} bytes for {d_out} rows, got shape {bits.shape}")
    return np.unpackbits(bits, count=d_out).astype(np.bool_)


def _mask(rows: npt.NDArray[np.intp], d_out: int) -> Mask:
    mask = np.zeros(d_out, dtype=np.bool_)
    mask[rows] = True
    return mask
