"""The few forms of adapters outside of fedray, on models of two layers whose numbers are drawn."""

import numpy as np
import pytest
import torch
from tiny import tiny_bert

from fedray.adapters.full import attach_full
from fedray.adapters.lora import attach_lora
from fedray.adapters.portable import form_of, single_lora
from fedray.adapters.reft import attach_reft
from fedray.config import LoraSection, ModelConfig, ReftSection
from fedray.models.architecture import architecture
from fedray.models.build import build

SECTION = LoraSection(rank=2, alpha=3.0)


def backbone():
    model = build(architecture(ModelConfig(**tiny_bert()), "classification", 2, 259, 256), "classification")
    return model.requires_grad_(False).eval()


def drawn(adapter, seed=0):
    """Give every value of an adapter that is no rotation a draw of its own."""
    rng = np.random.default_rng(seed)
    for name in adapter.names:
        adapter.load(name, rng.normal(size=adapter.layout(name).size).astype(np.float32))
    return adapter


@pytest.mark.parametrize(
    ("options", "form"),
    [
        ({}, "lora"),
        ({"rest_rank": 3, "rest_dropout": False}, "folded"),
        ({"rest_rank": 2, "mixer": 0.3}, "folded"),
        ({"rest_rank": 2, "mixer": "scalars"}, "folded"),
        ({"core": True}, "folded"),
        ({"rest_rank": 2, "mixer": "adaptive"}, "mixture"),
        ({"rest_rank": 4, "mixer": "experts"}, "mixture"),
        ({"rest_rank": 2, "mixer": "similarity"}, "mixture"),
    ],
)
def test_the_form_of_a_lora_and_what_it_adds(options, form):
    """Where there is a single LoRA, s' B' A' x is what the layer adds to W0 x."""
    adapter = drawn(attach_lora(backbone(), SECTION, **options))
    assert form_of(adapter) == form
    if form == "mixture":
        return
    found = single_lora(adapter)
    assert found.scale == pytest.approx(1.5 if form == "lora" else 1.0, rel=1e-15)
    assert found.rank == {"lora": 2}.get(form, 2 + options.get("rest_rank", 0))
    for path, layer in adapter.targets.items():
        x = torch.randn(5, layer.d_in, generator=torch.Generator().manual_seed(1))
        added = layer(x) - layer.base_layer(x)
        factors = found.factors[path]
        expected = found.scale * x.numpy() @ factors.A.T @ factors.B.T
        np.testing.assert_allclose(added.detach().numpy(), expected, rtol=1e-4, atol=1e-4)


def test_a_folded_lora_has_no_empty_components():
    """Rank 3 beside rank 2, of which one component of the first target has B = 0, and one of the other one A = 0."""
    adapter = drawn(attach_lora(backbone(), SECTION, rest_rank=3))
    layout, rest = adapter.layout("rest"), adapter.read("rest")
    (_, first_b), (_, second_a) = layout.items(rest)[1], layout.items(rest)[2]
    first_b[:, 1] = 0
    second_a[2] = 0
    adapter.load("rest", rest)
    assert single_lora(adapter).rank == 4


@pytest.mark.parametrize(("mixer", "form"), [(None, "reft"), ("adaptive", "mixture"), (0.5, "mixture")])
def test_the_form_of_interventions(mixer, form):
    assert form_of(attach_reft(backbone(), ReftSection(rank=2), mixer=mixer)) == form


def test_the_form_of_the_whole_model():
    assert form_of(attach_full(backbone())) == "full"
