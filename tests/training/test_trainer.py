"""What one client's round measures and reports."""

import math

import numpy as np
import pytest
from torch.nn.utils import parametrize

from fedray.adapters.lora import attach_lora
from fedray.adapters.reft import attach_reft
from fedray.config import LoraSection, ReftSection
from fedray.errors import TrainingError
from fedray.evaluation.evaluate import evaluate
from fedray.evaluation.metrics.accuracy import Accuracy
from fedray.randomness import keyed_rng
from fedray.types import Evaluation


def test_both_moments_are_measured_on_the_test_split(adapt, trainer, examples):
    adapter = adapt()
    local = trainer(adapter, epochs=3, measure=True)
    test = examples("classification", 6, sum(map(ord, "ann")) + 2)
    before = evaluate(adapter.model, test, "classification", [Accuracy()], 4, 0, "cpu")
    local.train()
    after = evaluate(adapter.model, test, "classification", [Accuracy()], 4, 0, "cpu")
    assert before != after
    assert (local.report.evaluation("aggregated"), local.report.evaluation("personalised")) == (before, after)


def test_nothing_is_measured_unless_asked(adapt, trainer):
    local = trainer(adapt())
    local.train()
    assert local.report.evaluation("aggregated") is None
    assert local.report.evaluation("personalised") is None
    assert local.report.seconds > 0


def test_measuring_does_not_change_training(adapt, trainer):
    quiet, measured = adapt(dropout=0.2), adapt(dropout=0.2)
    trainer(quiet).train()
    trainer(measured, measure=True).train()
    assert np.array_equal(quiet.read("lora"), measured.read("lora"))


def test_evaluation_uses_the_split_and_the_values_loaded_now(adapt, trainer, examples):
    adapter = adapt()
    local = trainer(adapter)
    validation = local.evaluate("validation")
    table = examples("classification", 4, sum(map(ord, "ann")) + 1)
    assert validation == evaluate(adapter.model, table, "classification", [Accuracy()], 4, 0, "cpu")
    adapter.load("lora", adapter.read("lora") * 2)
    assert local.evaluate("validation").loss != validation.loss


def test_the_default_metric_is_the_tasks(adapt, trainer):
    perplexity = math.exp(trainer(adapt("causal_lm"), "causal_lm").evaluate("test").loss)
    assert 0 <= trainer(adapt("causal_lm"), "causal_lm").evaluate("test").metric <= 1 < perplexity
    assert -1 <= trainer(adapt("regression"), "regression").evaluate("test").metric <= 1


def test_an_empty_split_has_no_loss(adapt, trainer):
    local = trainer(adapt(), measure=True)
    local._shard.tables["test"] = local._shard.tables["test"].slice(0, 0)
    local.train()
    assert isinstance(local.report.evaluation("aggregated"), Evaluation)
    assert local.report.evaluation("aggregated").num_examples == 0
    assert math.isnan(local.report.evaluation("personalised").loss)


def test_a_client_without_training_examples_is_an_error(adapt, trainer):
    with pytest.raises(TrainingError, match=r"'ann' has no training examples.*partition"):
        trainer(adapt(), num_examples=0).train()


def test_an_adapter_of_which_nothing_trains_is_an_error(adapt, trainer):
    adapter = adapt()
    adapter.set_trainable()
    with pytest.raises(TrainingError, match=r"'ann': the adapter has no trainable group; the method's attach\(\) must"):
        trainer(adapter).train()


def test_report_before_training(adapt, trainer):
    report = trainer(adapt(), client="bob", server_round=4).report
    assert report.steps == 0
    assert math.isnan(report.train_loss)


def test_recorded_values_are_in_the_report(adapt, trainer):
    local = trainer(adapt())
    local.record("lam", 0.25)
    local.record("clusters", [0.5, 0.5])
    local.record("lam", 0.75)
    early = local.report
    local.record("mask_size", 3)
    assert early.recorded == {"lam": 0.75, "clusters": [0.5, 0.5]}
    assert local.report.recorded["mask_size"] == 3


def test_the_generator_is_keyed_by_seed_purpose_round_and_client(adapt, trainer):
    local = trainer(adapt(), client="bob", server_round=4, seed=9)
    assert local.rng("mask").integers(1 << 60) == keyed_rng(9, "mask", 4, "bob").integers(1 << 60)


def test_the_mixer_is_recorded_from_the_personalised_evaluation_alone(backbone, trainer):
    """What the evaluations of other examples, or before training, left behind must not count."""
    adapter = attach_lora(backbone("classification"), LoraSection(rank=2), rest_rank=2, mixer="adaptive", seed=1)
    local = trainer(adapter, measure=True)
    local.evaluate("validation")
    local.train()
    adapter.observed()
    local.evaluate("test")
    means = adapter.observed()
    assert list(means) == ["mixer_mean"]
    assert local.report.recorded == means


def test_without_a_mixer_nothing_is_recorded(adapt, trainer):
    local = trainer(adapt(), measure=True)
    local.train()
    assert local.report.recorded == {}


def test_rotations_are_computed_once_per_evaluation(backbone, trainer):
    """Six test examples in batches of 4 and 2: the second batch needs no rotation of its own."""
    adapter = attach_reft(backbone("classification"), ReftSection(rank=2, layers=(0,), positions="l1"), seed=1)
    (rotate_layer,) = (module for module in adapter.model.modules() if parametrize.is_parametrized(module))
    calls = []
    rotate_layer.parametrizations.weight[0].register_forward_hook(lambda *_: calls.append(1))
    trainer(adapter).evaluate("test")
    assert len(calls) == 1
