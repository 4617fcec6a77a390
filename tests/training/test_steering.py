"""What steering adds, against formulas written out, and where it is added."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from fedray.adapters.layout import Slot
from fedray.adapters.reft import attach_reft
from fedray.config import ReftSection
from fedray.errors import TrainingError
from fedray.training.steering import Proximal, Shift, Tail

SGD = {"optimizer": "sgd", "lr": 0.1, "clip": None, "batch_size": 11, "max_steps": 1}


def read(adapter):
    return {name: adapter.read(name) for name in adapter.names}


def moved(adapter, local, **options):
    """One training; returns the values before it and how far they moved, by group."""
    before = read(adapter)
    local.train(**options)
    return before, {name: after - before[name] for name, after in read(adapter).items()}


def drawn(adapter, seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=adapter.layout(name).size).astype(np.float32) for name in adapter.names}


def test_proximal_is_added_to_the_gradient(adapt, trainer):
    """One step of SGD: θ − lr (g + μ (θ − anchor)), so that against no steering it moves by −lr μ (θ − anchor) more."""
    plain, steered = adapt(), adapt()
    anchor = drawn(plain, 1)
    _, without = moved(plain, trainer(plain, **SGD))
    before, with_ = moved(steered, trainer(steered, **SGD), steering=Proximal(anchor, 0.7))
    for name, start in before.items():
        expected = without[name] - 0.1 * 0.7 * (start - anchor[name])
        np.testing.assert_allclose(with_[name], expected, atol=1e-6)
        assert np.abs(with_[name] - without[name]).max() > 0.05


def test_a_shift_is_added_to_the_gradient(adapt, trainer):
    plain, steered = adapt(), adapt()
    by = drawn(plain, 2)
    _, without = moved(plain, trainer(plain, **SGD))
    _, with_ = moved(steered, trainer(steered, **SGD), steering=Shift(by))
    for name, shift in by.items():
        np.testing.assert_allclose(with_[name], without[name] - 0.1 * shift, atol=1e-6)


def test_only_what_has_a_vector_is_steered(adapt, trainer):
    """`lora.B`: its vector goes to the slots of part B, in the order of the layout."""
    plain, steered = adapt(), adapt()
    layout = plain.layout("lora")
    by = np.arange(1, 1 + sum(slot.size for slot in layout.slots if slot.part == "B"), dtype=np.float32)
    _, without = moved(plain, trainer(plain, **SGD))
    _, with_ = moved(steered, trainer(steered, **SGD), steering=Shift({"lora.B": by}))
    assert np.array_equal(with_["head"], without["head"])
    is_b = layout.mask({"B"})
    assert np.array_equal(with_["lora"][~is_b], without["lora"][~is_b])
    np.testing.assert_allclose(with_["lora"][is_b], without["lora"][is_b] - 0.1 * by, atol=1e-5)


@pytest.mark.parametrize("steering", [Proximal, lambda anchor, _: Shift({n: 0 * v for n, v in anchor.items()})])
def test_what_steers_with_zero_changes_no_bit(adapt, trainer, steering):
    train = {"epochs": 3, "weight_decay": 0.1, "clip": 0.1, "accumulation": 2}
    plain, steered = adapt(dropout=0.2), adapt(dropout=0.2)
    trainer(plain, **train).train()
    trainer(steered, **train).train(steering=steering(drawn(plain, 3), 0.0))
    for name, values in read(plain).items():
        assert np.array_equal(values, steered.read(name))


def test_the_steered_gradient_is_clipped(adapt, trainer):
    """A gradient of norm above 1 is scaled to norm 1, so that a step of SGD has length lr."""
    adapter = adapt()
    _, far = moved(adapter, trainer(adapter, **{**SGD, "clip": 1.0}), steering=Proximal(drawn(adapter, 4), 50.0))
    assert np.linalg.norm(np.concatenate([*far.values()])) == pytest.approx(0.1, rel=1e-4)


def test_the_reported_loss_is_without_steering(adapt, trainer):
    plain, steered = adapt(), adapt()
    one, other = trainer(plain, **SGD), trainer(steered, **SGD)
    one.train()
    other.train(steering=Proximal(drawn(plain, 5), 10.0))
    assert one.report.train_loss == other.report.train_loss


SLOTS = (Slot("q", "A", (3, 4)), Slot("q", "B", (5, 3)), Slot("head", "tensor", (2,)), Slot("v", "A", (2, 3)))
SLOTS = (*SLOTS, Slot("v", "B", (4, 2)))


def penalty(values, keep, weight):
    """λ Σ ‖A[m:]‖ ‖B[:, m:]‖ of one client, by torch's autograd on slices."""
    parts = torch.split(values, [slot.size for slot in SLOTS])
    a, b, _, other_a, other_b = (part.view(slot.shape) for part, slot in zip(parts, SLOTS, strict=True))
    return weight * (a[keep:].norm() * b[:, keep:].norm() + other_a[keep:].norm() * other_b[:, keep:].norm())


def test_tails_gradient_is_that_of_its_penalty():
    """Two clients of unequal tails and weights; the second target has rank 2, so a tail from 2 on is empty."""
    values = torch.randn(2, sum(slot.size for slot in SLOTS), generator=torch.Generator().manual_seed(1))
    tails = [Tail(1, 0.5), Tail(2, 3.0)]
    found = Tail.gradient(tails, values, torch.zeros_like(values), SLOTS)
    for row, tail, gradient in zip(values, tails, found, strict=True):
        leaf = row.clone().requires_grad_()
        (expected,) = torch.autograd.grad(penalty(leaf, tail.keep, tail.weight), leaf)
        torch.testing.assert_close(gradient, torch.nan_to_num(expected))
        assert gradient.abs().max() > 0.1


def test_a_tail_of_zeros_has_no_gradient():
    """B = 0, as at the start: ‖B_t‖ = 0, and its own direction is undefined."""
    values = torch.ones(1, sum(slot.size for slot in SLOTS))
    values[:, 12:27] = 0  # q.B
    found = Tail.gradient([Tail(1, 1.0)], values, values, SLOTS)
    assert not found[:, :27].any()
    assert found[:, 29:].any()


def test_a_tail_needs_both_factors(adapt, trainer):
    with pytest.raises(TrainingError, match=r"Tail\(\.\.\.\)\): needs both factors of LoRA in training; got A"):
        trainer(adapt()).train(["lora.A"], steering=Tail(1, 0.1))


def test_mistakes_are_named(adapt, trainer, backbone):
    adapter = adapt()
    with pytest.raises(TrainingError, match=r"'lora' has \d+ values, the vector has shape \(3,\)"):
        trainer(adapter).train(steering=Shift({"lora": np.zeros(3, np.float32)}))
    with pytest.raises(KeyError, match="no group 'loar'"):
        trainer(adapter).train(steering=Shift({"loar": np.zeros(3, np.float32)}))
    reft = attach_reft(backbone("classification"), ReftSection(rank=2), seed=1)
    with pytest.raises(TrainingError, match=r"train\(steering=.*is a rotation.*use adapter: lora"):
        trainer(reft).train(steering=Proximal({"reft": reft.read("reft")}, 1.0))
    with pytest.raises(TrainingError, match=r"train\(mean_gradient=.*is a rotation.*nodireft"):
        trainer(reft).train(mean_gradient=True)


def test_what_has_no_gradient_in_a_step_is_not_steered(backbone, trainer):
    """A prompt of one token is its own prefix and has no suffix, whose intervention then stays where it is."""
    section = ReftSection(rank=2, kind="nodireft", positions="f1+l2", layers=(0,))
    adapter = attach_reft(backbone("causal_lm"), section, seed=1)
    local = trainer(adapter, "causal_lm", num_examples=1, batch_size=1, max_steps=1, weight_decay=0.1)
    table = local._shard.tables["train"]
    short = {"input_ids": [[7, 5]], "labels": [[-100, 5]]}
    local._shard.tables["train"] = pa.Table.from_pydict(short, schema=table.schema.remove_metadata())
    _, far = moved(adapter, local, steering=Shift({"reft": np.ones(adapter.layout("reft").size, np.float32)}))
    slots = adapter.layout("reft").views(far["reft"])
    assert any(view.any() for name, view in slots.items() if "prefix" in name)
    assert not any(view.any() for name, view in slots.items() if "suffix" in name)
