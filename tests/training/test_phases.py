"""Several trainings of chosen parts in one round: what moves, which batches it sees, and what is reported."""

import math

import numpy as np
import pytest

from fedray.adapters.lora import attach_lora
from fedray.config import LoraSection
from fedray.errors import TrainingError
from fedray.randomness import keyed_rng
from fedray.training.loop import Train, steps
from fedray.training.process_group import SINGLE_PROCESS
from fedray.training.steering import Proximal

EVERYTHING = ["lora", "head"]


def read(adapter):
    return {name: adapter.read(name) for name in adapter.names}


def differ(one, other):
    return {name for name in one if not np.array_equal(one[name], other[name])}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(("parts", "rests"), [(["head"], "lora"), (["lora"], "head")])
def test_what_rests_keeps_its_bits(adapt, trainer, optimizer, parts, rests):
    """Under weight decay and momentum, with a rate that decays."""
    adapter = adapt()
    before = read(adapter)
    local = trainer(adapter, optimizer=optimizer, weight_decay=0.3, epochs=3, schedule="linear")
    local.train(parts)
    assert differ(before, read(adapter)) == set(parts)
    assert rests not in parts
    local.train()
    assert differ(before, read(adapter)) == set(EVERYTHING)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_one_factor_trains(adapt, trainer, optimizer):
    adapter = adapt()
    is_b, before = adapter.layout("lora").mask({"B"}), read(adapter)
    trainer(adapter, optimizer=optimizer, weight_decay=0.3).train(["lora.B"])
    after = adapter.read("lora")
    assert np.array_equal(after[~is_b], before["lora"][~is_b])
    assert not np.isclose(after[is_b], before["lora"][is_b]).any()
    assert np.array_equal(adapter.read("head"), before["head"])


def test_what_rests_takes_no_part_in_clipping(adapt, trainer):
    """The head's gradient alone is scaled to norm 0.01: a step of SGD has length 0.01 lr, whatever LoRA's would be."""
    adapter = adapt()
    before = adapter.read("head")
    trainer(adapter, optimizer="sgd", lr=0.5, clip=0.01, max_steps=1).train(["head"])
    assert np.linalg.norm(adapter.read("head") - before) == pytest.approx(0.5 * 0.01, rel=1e-4)


def test_naming_everything_is_naming_nothing(adapt, trainer):
    one, other = adapt(dropout=0.2), adapt(dropout=0.2)
    trainer(one, epochs=2).train()
    trainer(other, epochs=2).train(EVERYTHING)
    assert not differ(read(one), read(other))


def test_a_second_training_is_as_of_a_new_optimizer_with_other_batches(adapt, trainer, examples):
    """The same values trained in phase 1 alone: `phase` keys the draws, and nothing else carries over."""
    adapter, again = adapt(dropout=0.2), adapt(dropout=0.2)
    local = trainer(adapter)
    local.train()
    for name, values in read(adapter).items():
        again.load(name, values)
    local.train()
    trainer(again).train(phase=1)
    assert not differ(read(adapter), read(again))
    third = adapt(dropout=0.2)
    trainer(third).train()
    trainer(third).train()  # phase 0 once more
    assert differ(read(adapter), read(third)) == set(EVERYTHING)


def test_phases_have_other_orders_and_phase_0_todays(adapt, trainer):
    """Dropout, too; the keys of phase 0 have no trace of phases."""
    training_context = trainer(adapt(), batch_size=2)._training_context
    table = trainer(adapt())._shard.tables["train"]

    def first_ids(phase):
        step = next(steps(Train(table, "ann", 0, phase=phase), training_context, SINGLE_PROCESS))
        return step.micro_batches[0]["input_ids"].tolist()

    order = keyed_rng(3, "order", 0, "ann", 0).permutation(11)
    longest = max(len(table["input_ids"][int(row)].as_py()) for row in order[:2])
    expected = [table["input_ids"][int(row)].as_py() for row in order[:2]]
    assert first_ids(0) == [[*row, *[0] * (longest - len(row))] for row in expected]
    assert first_ids(0) != first_ids(1) != first_ids(2)
    keys = []
    adapter = adapt(dropout=0.2)
    adapter.set_dropout_key = keys.append
    local = trainer(adapter)
    for _ in range(3):
        local.train()
    assert len(set(keys)) == len(keys) == 9


@pytest.mark.parametrize(
    ("amount", "number"), [({"steps": 7}, 7), ({"epochs": 2}, 6), ({"epochs": 0.4}, 2), ({}, 3), ({"steps": 1}, 1)]
)
def test_amounts(adapt, trainer, amount, number):
    """Eleven examples in batches of four are three steps an epoch."""
    local = trainer(adapt())
    local.train(**amount)
    assert local.report.steps == number


def test_the_configured_most_steps_limit_epochs_but_not_steps(adapt, trainer):
    local = trainer(adapt(), max_steps=2)
    local.train(epochs=5)
    assert local.report.steps == 2
    local.train(steps=4)
    assert local.report.steps == 6


def test_the_report_is_of_all_trainings(adapt, trainer):
    """Two steps, then one: the mean over three losses is (2 a + b) / 3."""
    local, first = trainer(adapt()), trainer(adapt())
    first.train(steps=2)
    local.train(steps=2)
    seconds = local.report.seconds
    local.train(steps=1, measure=False)
    both, two = local.report, first.report
    assert both.steps == 3
    assert both.seconds > seconds
    last = 3 * both.train_loss - 2 * two.train_loss
    assert math.isfinite(last)
    assert last != pytest.approx(two.train_loss, rel=1e-3)


def test_aggregated_is_before_the_first_and_personalised_after_the_last_measured_training(adapt, trainer):
    adapter = adapt()
    local = trainer(adapter, measure=True)
    assert local.measures
    seen = [local.evaluate("test")]
    for measure in (False, True, False):
        local.train(measure=measure)
        seen.append(local.evaluate("test"))
    assert len({evaluation.loss for evaluation in seen}) == 4
    assert (local.report.evaluation("aggregated"), local.report.evaluation("personalised")) == (seen[0], seen[2])
    local.measure()
    assert local.report.evaluation("personalised") == seen[3]


def test_measure_is_of_what_is_loaded(adapt, trainer):
    adapter = adapt()
    quiet, local = trainer(adapter), trainer(adapter, measure=True)
    quiet.measure()
    assert quiet.report.evaluation("personalised") is None
    assert not quiet.measures
    local.train(measure=False)
    assert local.report.evaluation("personalised") is None
    adapter.load("lora", 0 * adapter.read("lora"))
    local.measure()
    assert local.report.evaluation("personalised") == local.evaluate("test")


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_the_mean_gradient_is_that_of_a_plain_loop(adapt, trainer, task):
    """SGD without momentum, decay or clipping moves by −lr times the sum of the gradients of its 8 steps."""
    adapter = adapt(task)
    local = trainer(adapter, task, optimizer="sgd", lr=0.1, clip=None, batch_size=3, epochs=2)
    before = read(adapter)
    found = local.train(mean_gradient=True)
    for name, values in read(adapter).items():
        np.testing.assert_allclose(found[name], (before[name] - values) / (0.1 * 8), atol=2e-6)
        assert np.abs(found[name]).max() > 1e-3


def test_the_mean_gradient_is_before_steering_and_clipping(adapt, trainer):
    """In one step the values do not depend on either."""
    raw, steered = adapt(), adapt()
    one = trainer(raw, max_steps=1, clip=None).train(mean_gradient=True)
    anchor = {name: 0 * values for name, values in read(steered).items()}
    other = trainer(steered, max_steps=1, clip=0.01).train(mean_gradient=True, steering=Proximal(anchor, 5.0))
    assert not differ(one, other)
    assert trainer(raw).train() == {}


def test_the_mean_gradient_is_zero_where_nothing_trains(backbone, trainer):
    """A frozen branch, and what rests."""
    adapter = attach_lora(backbone("classification"), LoraSection(rank=2), rest_rank=1, seed=1)
    found = trainer(adapter, measure=True).train(["lora.B"], mean_gradient=True)
    assert {name: vector.shape for name, vector in found.items()} == {
        name: (adapter.layout(name).size,) for name in adapter.names
    }
    is_b = adapter.layout("lora").mask({"B"})
    assert found["lora"][is_b].any()
    assert not found["lora"][~is_b].any()
    assert not found["rest"].any()
    assert not found["head"].any()


def test_mistakes_are_named(adapt, trainer):
    adapter = adapt()
    adapter.set_trainable("lora.B", "head")
    local = trainer(adapter)
    with pytest.raises(TrainingError, match=r"parts=\['lora', 'head'\]\): not declared to train: lora; .*attach\(\)"):
        local.train(["lora", "head"])
    with pytest.raises(TrainingError, match=r"train\(parts=\[\]\): names nothing"):
        local.train([])
    with pytest.raises(KeyError, match="no group 'haed'.*did you mean 'head'"):
        local.train(["haed"])
    with pytest.raises(TrainingError, match=r"train\(epochs=1, steps=2\): give one of them"):
        local.train(epochs=1, steps=2)
    for amount in ({"epochs": 0}, {"steps": 0}, {"steps": -1}):
        with pytest.raises(TrainingError, match="expected more than 0"):
            local.train(**amount)
    assert local.report.steps == 0


def test_what_rested_trains_again(adapt, trainer):
    """Also where a training of a part failed."""
    adapter = adapt()
    with pytest.raises(TrainingError, match="not finite"):
        trainer(adapter, lr=1e39, max_steps=1).train(["head"])
    assert adapter.num_trainable() == adapter.layout("lora").size + adapter.layout("head").size
    assert all(parameter.grad is None for group in adapter.groups for parameter in group.parameters())


def test_gradients_that_a_failed_training_left_do_not_count(adapt, trainer):
    adapter, fresh = adapt(), adapt()
    for group in adapter.groups:
        for parameter in group.parameters():
            parameter.grad = parameter.new_ones(parameter.shape)
    trainer(adapter).train(["head"])
    trainer(adapter).train(phase=1)
    local = trainer(fresh)
    local.train(["head"])
    local.train()
    assert not differ(read(adapter), read(fresh))


def test_a_settled_adapter_refuses_set_trainable(adapt):
    adapter = adapt()
    adapter.set_trainable("lora")
    adapter.settle()
    with pytest.raises(TrainingError, match=r"set_trainable\(\) is for the method's attach\(\).*train\(parts="):
        adapter.set_trainable("head")
    assert adapter.num_trainable() == adapter.layout("lora").size
