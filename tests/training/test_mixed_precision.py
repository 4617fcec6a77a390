"""Full fine-tuning of a bfloat16 model: what is held and computed in which type, and whole trainings."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fedray.adapters.full import attach_full
from fedray.adapters.heads import float_head
from fedray.adapters.lora import attach_lora
from fedray.config import LoraSection
from fedray.training.mixed_precision import mixed_precision


def batch():
    ids = torch.randint(3, 40, (3, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def mixed(model):
    float_head(model.to(torch.bfloat16).requires_grad_(False))
    return mixed_precision(attach_full(model))


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_the_model_computes_as_torch_does_under_autocast(backbone, task) -> None:
    """With a head that computes in float32 on what the base model gives it."""
    reference = backbone(task).to(torch.bfloat16).float()
    adapter = mixed(backbone(task))
    assert {parameter.dtype for parameter in adapter.model.parameters()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        if task == "causal_lm":
            expected = reference(**batch()).logits
        else:
            pooled = reference.bert(**batch()).pooler_output.float()
    if task == "classification":
        expected = reference.classifier(pooled)
    found = adapter.model(**batch()).logits
    assert found.dtype == (torch.float32 if task == "classification" else torch.bfloat16)
    assert torch.equal(found, expected)


def test_products_are_computed_in_bfloat16_and_normalisation_in_float32(backbone) -> None:
    model = backbone("classification")
    adapter, seen = mixed(model), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.LayerNorm):
            module.register_forward_hook(lambda module, _, output, name=name: seen.update({name: output.dtype}))
    adapter.model(**batch())
    assert seen["bert.encoder.layer.0.attention.self.query"] == torch.bfloat16
    assert seen["bert.encoder.layer.1.output.LayerNorm"] == seen["classifier"] == torch.float32


def test_updates_that_bfloat16_would_lose_are_kept(trainer, backbone) -> None:
    """A step of 1e-5 beside weights of about 0.3, whose neighbours in bfloat16 are 1e-3 away; eight of them add up."""
    adapter = mixed(backbone("classification"))
    before = adapter.read("full")
    trainer(adapter, num_examples=32, lr=1e-5, optimizer="adamw", weight_decay=0.0).train()
    moved = np.abs(adapter.read("full") - before)
    assert 4e-5 < moved.max() < 9e-5
    assert np.median(moved[moved > 0]) > 1e-5
    rounded = torch.tensor(before + moved).bfloat16() == torch.tensor(before).bfloat16()
    assert rounded.float().mean() > 0.9


@pytest.mark.parametrize("task", ["classification", "regression", "causal_lm"])
def test_a_training_ends_near_that_in_float32(trainer, backbone, task) -> None:
    """Twelve steps; the weights begin where bfloat16 rounds them to."""
    whole = attach_full(backbone(task).to(torch.bfloat16).float())
    short, start = mixed(backbone(task)), whole.read("full")
    assert np.array_equal(short.read("full"), start)
    for adapter in (whole, short):
        local = trainer(adapter, task, num_examples=16, epochs=3, lr=1e-3, measure=True)
        local.train()
    update, expected = short.read("full") - start, whole.read("full") - start
    cosine = update @ expected / np.linalg.norm(update) / np.linalg.norm(expected)
    assert cosine > 0.9
    assert np.linalg.norm(update) == pytest.approx(np.linalg.norm(expected), rel=0.1)


def test_what_needs_no_masters_stays_as_it_is(backbone) -> None:
    """LoRA on a bfloat16 model trains no parameter of the model; a float32 model loses nothing."""
    lora = attach_lora(backbone("causal_lm").to(torch.bfloat16), LoraSection(rank=2))
    for adapter in (lora, attach_full(backbone("causal_lm"))):
        before = copy.copy(adapter.model.__dict__)
        types = {name: parameter.dtype for name, parameter in adapter.model.named_parameters()}
        assert mixed_precision(adapter) is adapter
        assert adapter.model.__dict__ == before
        assert {name: parameter.dtype for name, parameter in adapter.model.named_parameters()} == types
