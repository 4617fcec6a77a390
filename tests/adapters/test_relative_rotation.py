"""pyreft's coordinates of R, against torch's own parametrization and by hand."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fedray.adapters.relative_rotation import RelativeRotation

D, R = 12, 4
ROTATION = RelativeRotation()


def columns(seed: int, width: int = D, rank: int = R) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, rank, generator=generator))[0]


def base_of(loaded: Tensor) -> Tensor:
    """B, [d, d], by LAPACK: the reflections of the loaded columns, which give them back up to their signs."""
    product = torch.ormqr(*torch.geqrf(loaded), torch.eye(len(loaded)))
    rank = loaded.shape[1]
    product[:, :rank] *= (product[:, :rank] * loaded).sum(0).sign()
    return product


def placed(raw: Tensor, lower: Tensor) -> Tensor:
    """A raw tensor whose X has other values below its diagonal."""
    result = raw.clone()
    result[: len(lower)] += lower.tril(-1)
    return result


@pytest.mark.parametrize("loaded", [columns(0), torch.eye(D, R), -torch.eye(D, R), torch.eye(D, R).flip(0)])
def test_the_loaded_rotation_is_given_back(loaded: Tensor) -> None:
    torch.testing.assert_close(ROTATION(ROTATION.right_inverse(loaded)), loaded, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("width", "rank"), [(D, R), (R, R), (D, 1)])
def test_it_is_torchs_parametrization_with_one_of_its_draws(width: int, rank: int) -> None:
    """Values, and gradients with respect to X, at an X far from where training begins."""
    loaded = columns(1, width, rank)
    torchs = nn.Linear(rank, width, bias=False)
    with torch.no_grad():
        torchs.weight.copy_(loaded)
    parametrizations.orthogonal(torchs, orthogonal_map="householder")
    parametrization = torchs.parametrizations.weight
    torch.testing.assert_close(base_of(loaded)[:, :rank], loaded)
    parametrization[0].base.copy_(base_of(loaded))
    raw = placed(ROTATION.right_inverse(loaded), columns(2, width, rank)).requires_grad_()
    with torch.no_grad():
        parametrization.original.copy_(raw[:width])
    torch.testing.assert_close(ROTATION(raw), torchs.weight, atol=1e-6, rtol=0)
    weights = columns(3, width, rank)
    (ROTATION(raw) * weights).sum().backward()
    (torchs.weight * weights).sum().backward()
    torch.testing.assert_close(raw.grad[:width], parametrization.original.grad, atol=1e-5, rtol=0)
    assert not raw.grad[width:].any()


def test_a_first_step_moves_r_twice_as_far() -> None:
    """v = e_j + ε e_i with i > r gives I − 2vvᵀ/(vᵀv) ≈ I − 2 e_j e_jᵀ − 2ε (e_i e_jᵀ + e_j e_iᵀ), and the sign −1 of
    column j turns that into B e_j + 2ε B e_i."""
    loaded = columns(4)
    raw = ROTATION.right_inverse(loaded).double()
    lower = torch.zeros(D, R, dtype=torch.float64)
    lower[9, 2] = 1e-5
    moved = (ROTATION(placed(raw, lower)) - ROTATION(raw)) / 1e-5
    expected = torch.zeros(D, R)
    expected[:, 2] = 2 * base_of(loaded)[:, 9]
    torch.testing.assert_close(moved.float(), expected, atol=1e-4, rtol=0)


def test_stacks_of_rotations_are_computed_one_by_one() -> None:
    raws = [placed(ROTATION.right_inverse(columns(seed)), columns(seed + 10)) for seed in range(3)]
    stacked = ROTATION(torch.stack(raws))
    for raw, found in zip(raws, stacked, strict=True):
        torch.testing.assert_close(found, ROTATION(raw), atol=1e-6, rtol=0)
        np.testing.assert_allclose(found.T @ found, np.eye(R), atol=1e-6)


def test_shapes_are_known_without_values() -> None:
    raw = ROTATION.right_inverse(torch.empty(D, R, device="meta"))
    assert raw.shape == (2 * D, R)
    assert ROTATION(raw).shape == (D, R)
