"""pyreft's coordinates of a rotation: a product of Householder reflections, times the rotation that was loaded.

torch's orthogonal parametrization (Lezcano-Casado, arXiv 1909.09501) keeps B, a d × d matrix whose first r columns are
the loaded Rᵀ, and trains Rᵀ = B · H(X) from X with H(X) = [I; 0]. The other columns of B are random, so that two
trainings from the same R differ. Here B is the product of the r reflections of which the loaded Rᵀ is the first r
columns: one of pyreft's possible draws, the same one every time, and 2·d·r numbers instead of d·d.
"""

import torch
from torch import Tensor, nn


class RelativeRotation(nn.Module):
    """A parametrization with orthonormal columns.

    Its raw tensor is [..., 2·d, r]: X, and below it the reflections of B, whose gradient is zero.
    """

    def forward(self, raw: Tensor) -> Tensor:
        """Return Rᵀ, [..., d, r]."""
        x, loaded = raw.chunk(2, dim=-2)
        vectors = x.tril(-1)
        moved = torch.linalg.householder_product(vectors, 2 / (1 + (vectors * vectors).sum(-2)))
        return _turned(loaded.detach(), moved * _signs(x.detach())[..., None, :])

    @torch.no_grad()
    def right_inverse(self, rotation: Tensor) -> Tensor:
        """Return the raw tensor of which the rotation, [..., d, r], is the loaded one."""
        if rotation.is_meta:  # torch.geqrf computes no shapes
            return torch.cat([rotation, rotation], dim=-2)
        loaded, scales = torch.geqrf(rotation)
        diagonal = loaded.diagonal(dim1=-2, dim2=-1)
        diagonal.sign_()
        diagonal[scales == 0] *= -1  # LAPACK leaves out a reflection where the column is already a unit vector
        start = torch.zeros_like(loaded)
        start.diagonal(dim1=-2, dim2=-1).fill_(-1)
        return torch.cat([start, loaded], dim=-2)


def _signs(raw: Tensor) -> Tensor:
    """Return the signs of the columns, [..., r]: on the diagonal, where no gradient arrives."""
    return raw.diagonal(dim1=-2, dim2=-1).sign()


def _turned(loaded: Tensor, matrix: Tensor) -> Tensor:
    """Return B · matrix, with the reflections I − v vᵀ · 2/(vᵀv) of B as one product I − V U⁻¹ Vᵀ."""
    rank = loaded.shape[-1]
    unit = torch.eye(loaded.shape[-2], rank, dtype=loaded.dtype, device=loaded.device)
    vectors = loaded.tril(-1) + unit
    inner = vectors.mT @ vectors
    upper = inner.triu(1) + torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1) / 2)
    signed = torch.cat([matrix[..., :rank, :] * _signs(loaded)[..., :, None], matrix[..., rank:, :]], dim=-2)
    coefficients: Tensor = torch.linalg.solve_triangular(upper, vectors.mT @ signed, upper=True)
    return signed - vectors @ coefficients
