"""Gradients of frozen weights by subspace iteration against torch.autograd on the weights themselves."""

import numpy as np
import pytest
import torch
from families import tiny_family

from fedray.adapters.lora import attach_lora
from fedray.config import LoraSection, TrainConfig
from fedray.errors import TrainingError
from fedray.evaluation.losses import num_units, score
from fedray.training.training_context import TrainingContext
from fedray.training.weight_gradients import weight_gradients


def by_hand(adapter, table, task):
    """∂/∂W of the mean loss, W the base layer's weight, one example at a time."""
    units = num_units(table, task).sum()
    weights = {path: layer.get_base_layer().weight for path, layer in adapter.targets.items()}
    totals = {path: torch.zeros_like(weight, dtype=torch.float64) for path, weight in weights.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    for row in table.to_pylist():
        batch = {
            "input_ids": torch.tensor([row["input_ids"]]),
            "attention_mask": torch.ones(1, len(row["input_ids"]), dtype=torch.long),
            "labels": torch.tensor([row["labels"]]),
        }
        loss = score(adapter.model, batch, task).losses.sum() / float(units)
        for path, found in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
            totals[path] += found
    for weight in weights.values():
        weight.requires_grad_(False)
    return {path: total.numpy() for path, total in totals.items()}


@pytest.mark.parametrize("task", ["classification", "regression", "causal_lm"])
def test_at_full_rank_they_are_exact(adapt, trainer, task):
    adapter = adapt(task, dropout=0.3)
    local = trainer(adapter, task, num_examples=7)
    before = adapter.read("lora")
    found = local.weight_gradients(16, 100)
    expected = by_hand(adapter, local._shard.tables["train"], task)
    assert set(found) == set(expected) == set(adapter.targets)
    for path, gradient in expected.items():
        assert np.abs(gradient).max() > 1e-4
        np.testing.assert_allclose(found[path].dense(), gradient, atol=1e-5 * np.abs(gradient).max())
    assert np.array_equal(adapter.read("lora"), before)
    assert all(parameter.grad is None for parameter in adapter.model.parameters())


def test_a_transposed_weight(examples):
    """GPT-2 stores [d_in, d_out]; the gradient is that of W [d_out, d_in] all the same."""
    adapter = attach_lora(tiny_family("gpt2", "classification", spread=0.3), LoraSection(rank=2))
    context = TrainingContext("classification", TrainConfig(batch_size=1), 0, 0)
    table = examples("classification", 5, 1)
    found, expected = weight_gradients(adapter, table, 99, context), by_hand(adapter, table, "classification")
    for path, gradient in expected.items():
        np.testing.assert_allclose(found[path].dense(), gradient.T, atol=1e-5 * np.abs(gradient).max())


def test_at_a_lower_rank_they_are_nearly_the_best(adapt, trainer):
    """Of all matrices of rank 3 none is nearer than the SVD's, whose error is the norm of the other singular values."""
    adapter = adapt()
    local = trainer(adapter, num_examples=7)
    expected = by_hand(adapter, local._shard.tables["train"].slice(0, 5), "classification")
    for path, gradient in local.weight_gradients(3, 5).items():
        assert gradient.rank == 3
        best = np.linalg.norm(np.linalg.svd(expected[path])[1][3:])
        error = np.linalg.norm(gradient.dense() - expected[path])
        assert best * (1 - 1e-4) <= error <= 1.01 * best


def test_the_seed_decides(adapt, trainer):
    adapter = adapt()
    local = trainer(adapter, num_examples=7)
    table, context = local._shard.tables["train"], local._training_context
    once, again = (weight_gradients(adapter, table, 3, context) for _ in range(2))
    assert all(np.array_equal(once[path].B, again[path].B) for path in once)


def test_a_client_without_examples_has_no_gradient(adapt, trainer):
    with pytest.raises(TrainingError, match=r"'ann' has no training examples.*partition"):
        trainer(adapt(), num_examples=0).weight_gradients(3, 5)
