"""The values of LoReFT's interventions: drawn, loaded and read back, and in training, where R stays a rotation."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fedray.adapters.adapter import Adapter
from fedray.adapters.draws import draw_reft
from fedray.adapters.reft import attach_reft
from fedray.config import ReftSection

Make = Callable[..., PreTrainedModel]
Batch = dict[str, Tensor]
Kinds = pytest.mark.parametrize("kind", ["loreft", "noreft", "direft", "nodireft"])
Rotations = pytest.mark.parametrize("rotation", ["absolute", "relative"])


def section(**fields: Any) -> ReftSection:
    return ReftSection(rank=3, **fields)


@Rotations
@Kinds
def test_flat_state_round_trips(make: Make, kind: str, rotation: str) -> None:
    """R to 1e-6, everything else bit for bit; R is exchanged with orthonormal rows."""
    adapter = attach_reft(make("bert"), section(kind=kind, rotation=rotation))
    layout = adapter.layout("reft")
    vector = draw_reft(layout, 7)
    adapter.load("reft", vector)
    for (slot, sent), (_, got) in zip(layout.items(vector), layout.items(adapter.read("reft")), strict=True):
        if slot.part == "R":
            np.testing.assert_allclose(got, sent, atol=1e-6)
            np.testing.assert_allclose(got @ got.T, np.eye(3), atol=1e-6)
        else:
            assert np.array_equal(got, sent)
    assert {slot.part for slot in layout.slots} == {"W", "b", "R" if kind in ("loreft", "direft") else "P"}


@Rotations
@pytest.mark.parametrize("rank", [3, 16])
def test_rotations_that_are_easy_to_get_wrong(make: Make, rank: int, rotation: str) -> None:
    """Unit vectors, negated and permuted ones (Householder reflections degenerate there), and a square R."""
    adapter = attach_reft(make("bert"), ReftSection(rank=rank, rotation=rotation))
    layout = adapter.layout("reft")
    eye = np.eye(rank, 16, dtype=np.float32)
    for value in (eye, -eye, eye[:, ::-1], np.linalg.qr(np.random.default_rng(0).normal(size=(16, rank)))[0].T):
        vector = draw_reft(layout, 0)
        for slot, view in layout.items(vector):
            if slot.part == "R":
                view[...] = value
        adapter.load("reft", vector)
        for slot, view in layout.items(adapter.read("reft")):
            if slot.part == "R":
                np.testing.assert_allclose(view, value, atol=1e-6)


def test_a_mean_of_rotations_is_retracted(make: Make) -> None:
    """The polar factor of (R1 + R2) / 2, by an independent formula: M (Mᵀ M)^(−1/2), transposed for rows."""
    adapter = attach_reft(make("bert"), section(layers=(0,)))
    layout = adapter.layout("reft")
    mean = (draw_reft(layout, 1) + draw_reft(layout, 2)) / 2
    adapter.load("reft", mean)
    rows = layout.views(mean)["bert.encoder.layer.0.prefix.R"].astype(np.float64)
    values, vectors = np.linalg.eigh(rows @ rows.T)
    expected = vectors @ np.diag(values**-0.5) @ vectors.T @ rows
    got = layout.views(adapter.read("reft"))["bert.encoder.layer.0.prefix.R"]
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_draws_are_keyed_and_orthonormal(make: Make) -> None:
    layout = attach_reft(make("bert"), section()).layout("reft")
    vector = draw_reft(layout, 3)
    assert np.array_equal(vector, draw_reft(layout, 3))
    assert not np.array_equal(vector, draw_reft(layout, 4))
    rotations = [view for slot, view in layout.items(vector) if slot.part == "R"]
    for rotation in rotations:
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-6)
    assert not np.array_equal(rotations[0], rotations[1])
    others = np.concatenate([view.ravel() for slot, view in layout.items(vector) if slot.part != "R"])
    assert 0.9 / 4 < np.abs(others).max() <= 1 / 4  # U(−1/√16, 1/√16)


def trained(adapter: Adapter, batch: Batch, steps: int, weight_decay: float = 0.01) -> np.ndarray:
    groups = [
        {"params": list(group.parameters), "weight_decay": weight_decay if group.weight_decay else 0.0}
        for group in adapter.trainable_groups()
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        adapter.model(**batch).logits.square().sum().backward()
        optimizer.step()
    return adapter.read("reft")


@Rotations
@pytest.mark.parametrize("kind", ["loreft", "direft"])
def test_r_stays_orthonormal_in_training(make: Make, batch: Batch, kind: str, rotation: str) -> None:
    adapter = attach_reft(make("bert"), section(kind=kind, rotation=rotation))
    start = draw_reft(adapter.layout("reft"), 0)
    vector = trained(adapter, batch, 30, weight_decay=0.1)
    for (slot, first), (_, last) in zip(
        adapter.layout("reft").items(start), adapter.layout("reft").items(vector), strict=True
    ):
        if slot.part == "R":
            np.testing.assert_allclose(last @ last.T, np.eye(3), atol=1e-5)
            # Nothing reads the last token of BERT's last block, so only that rotation cannot move.
            assert np.abs(last - first).max() > 1e-2 or slot.module == "bert.encoder.layer.1.suffix"


def test_weight_decay_on_the_raw_rotation_would_destroy_it(make: Make, batch: Batch) -> None:
    """Why `TrainableGroup.weight_decay` exists: if this passes without the zero, the exemption can go."""
    adapter = attach_reft(make("bert"), section())
    assert [(g.name, g.weight_decay, len(g.parameters)) for g in adapter.trainable_groups()] == [
        ("reft", True, 8),
        ("reft", False, 4),
        ("head", True, 2),
    ]
    everything = [p for group in adapter.trainable_groups() for p in group.parameters]
    optimizer = torch.optim.AdamW(everything, lr=0.01, weight_decay=0.01)
    adapter.model(**batch).logits.square().sum().backward()
    optimizer.step()
    broken = [view for slot, view in adapter.layout("reft").items(adapter.read("reft")) if slot.part == "R"]
    assert any(not rotation.any() for rotation in broken)


@Rotations
def test_training_from_the_same_vector_is_repeatable(make: Make, batch: Batch, rotation: str) -> None:
    """Whatever the adapter held before, and whatever the global generator's state."""
    adapter, results = attach_reft(make("bert"), section(rotation=rotation)), []
    vector, head = draw_reft(adapter.layout("reft"), 5), adapter.read("head")
    for seed in (1, 2):
        torch.manual_seed(seed)
        adapter.load("reft", vector)
        adapter.load("head", head)
        results.append(trained(adapter, batch, 5))
    assert np.array_equal(*results)
