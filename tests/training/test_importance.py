"""The batched Fisher information against one example at a time, unpadded, by torch.autograd."""

import numpy as np
import pytest
import torch
from families import tiny_family

from fedray.adapters.lora import attach_lora
from fedray.config import LoraSection
from fedray.errors import TrainingError
from fedray.evaluation.losses import score
from fedray.training.importance import fisher_importance


def by_hand(adapter, table, task):
    """Mean over examples of (sum over tokens of dL/dy)², L the loss of that example alone, y the layer's output; over
    the tokens of all calls, where a layer is called several times."""
    adapter.model.eval()
    totals = dict.fromkeys(adapter.targets, 0.0)
    outputs = {path: [] for path in adapter.targets}
    for path, module in adapter.targets.items():
        module.register_forward_hook(lambda _, __, output, path=path: outputs[path].append(output))
    for row in table.to_pylist():
        batch = {"input_ids": torch.tensor([row["input_ids"]]), "labels": torch.tensor([row["labels"]])}
        loss = adapter.model(**batch).loss
        if task == "causal_lm":
            loss = loss * sum(label != -100 for label in row["labels"][1:])
        for path in adapter.targets:
            gradients = torch.autograd.grad(loss, outputs[path], retain_graph=True)
            totals[path] = totals[path] + sum(gradient[0].sum(0) for gradient in gradients).double().numpy() ** 2
            outputs[path].clear()
    return {path: total / table.num_rows for path, total in totals.items()}


@pytest.mark.parametrize("task", ["classification", "regression", "causal_lm"])
def test_it_is_the_mean_of_per_example_squares(adapt, examples, task):
    """Texts of 3 to 12 tokens in batches of 4: padding and neighbours must not show."""
    table = examples(task, 10, 1)
    ours = fisher_importance(adapt(task), table, task, 4, 0, "cpu")
    expected = by_hand(adapt(task), table, task)
    assert set(ours) == set(expected)
    assert len(ours) == 4  # query and value of two blocks
    for path, values in expected.items():
        assert ours[path].shape == (16,)
        assert ours[path].dtype == np.float64
        assert values.max() > 1e-4
        np.testing.assert_allclose(ours[path], values, rtol=1e-3, atol=1e-6 * values.max())


def test_it_does_not_depend_on_the_batch_size(adapt, examples):
    adapter, table = adapt(), examples("classification", 10, 1)
    one, ten = (fisher_importance(adapter, table, "classification", size, 0, "cpu") for size in (1, 10))
    for path in one:
        np.testing.assert_allclose(ten[path], one[path], rtol=1e-3, atol=1e-6 * one[path].max())


def test_it_leaves_no_trace(adapt, examples):
    adapter, table = adapt(), examples("classification", 5, 1)
    before = adapter.read("lora")
    fisher_importance(adapter, table, "classification", 2, 0, "cpu")
    assert all(parameter.grad is None for parameter in adapter.model.parameters())
    assert all(not module._forward_hooks for module in adapter.targets.values())
    assert np.array_equal(adapter.read("lora"), before)


def test_dropout_is_off(adapt, examples):
    adapter, table = adapt(dropout=0.5), examples("classification", 5, 1)
    adapter.model.train()
    with_dropout = fisher_importance(adapter, table, "classification", 2, 0, "cpu")
    without = fisher_importance(adapt(), table, "classification", 2, 0, "cpu")
    assert all(np.array_equal(with_dropout[path], without[path]) for path in without)


def test_frozen_layers_have_importance_too(adapt, examples):
    """FedHFT's `pre` masks ask for it where B does not train."""
    adapter, table = adapt(), examples("classification", 5, 1)
    expected = fisher_importance(adapter, table, "classification", 2, 0, "cpu")
    adapter.set_trainable("head")
    frozen = fisher_importance(adapter, table, "classification", 2, 0, "cpu")
    for path in expected:
        np.testing.assert_allclose(frozen[path], expected[path], rtol=1e-6)


def test_it_needs_examples(adapt, examples):
    with pytest.raises(TrainingError, match="there are none"):
        fisher_importance(adapt(), examples("classification", 0, 1), "classification", 2, 0, "cpu")


def test_a_gradient_that_is_not_finite_is_an_error(adapt, examples):
    adapter = adapt()
    adapter.load("lora", np.full(adapter.layout("lora").size, 1e30, dtype=np.float32))
    with pytest.raises(TrainingError, match="not finite"):
        fisher_importance(adapter, examples("classification", 3, 1), "classification", 2, 0, "cpu")


def test_the_trainer_asks_for_the_training_examples(adapt, trainer, examples):
    adapter = adapt()
    table = examples("classification", 11, sum(map(ord, "ann")))
    expected = fisher_importance(adapter, table, "classification", 4, 0, "cpu")
    ours = trainer(adapter).importance()
    assert all(np.array_equal(ours[path], expected[path]) for path in expected)


def test_it_sees_the_second_branch(backbone, examples):
    """The output of a target is base plus both branches, so loading the second one changes the gradient there."""
    adapter = attach_lora(backbone("classification"), LoraSection(rank=2), rest_rank=2, mixer="none", seed=1)
    table = examples("classification", 5, 1)
    without = fisher_importance(adapter, table, "classification", 2, 0, "cpu")
    adapter.load("rest", np.random.default_rng(0).normal(size=adapter.layout("rest").size).astype(np.float32))
    loaded = fisher_importance(adapter, table, "classification", 2, 0, "cpu")
    assert any(not np.allclose(loaded[path], without[path], rtol=0.01) for path in without)
    batch = {"input_ids": torch.tensor([[3, 4]]), "labels": torch.tensor([0])}
    assert score(adapter.model, batch, "classification").losses.isfinite().all()


def test_a_layer_that_is_called_several_times(examples):
    """ALBERT's blocks are one block: its query and value have one output each, shifted at all their calls."""

    def adapted():
        return attach_lora(tiny_family("albert", "classification", spread=0.3, num_hidden_layers=3), LoraSection())

    table = examples("classification", 6, 1)
    ours = fisher_importance(adapted(), table, "classification", 4, 256, "cpu")
    expected = by_hand(adapted(), table, "classification")
    assert len(ours) == 2
    for path, values in expected.items():
        assert values.max() > 1e-5
        np.testing.assert_allclose(ours[path], values, rtol=1e-3, atol=1e-6 * values.max())


def test_layers_without_one_row_per_example_are_refused(examples):
    """XLNet works on [tokens, examples, d]; its rows of layer outputs would be taken for examples."""
    adapter = attach_lora(tiny_family("xlnet", "classification"), LoraSection(targets=("layer_1",)))
    with pytest.raises(TrainingError, match="not one row per example.*importance: energy"):
        fisher_importance(adapter, examples("classification", 6, 1), "classification", 3, 256, "cpu")
