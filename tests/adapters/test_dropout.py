from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedray.adapters.context import ForwardContext
from fedray.adapters.dropout import KeyedDropout, dropout_mask
from fedray.adapters.lora import attach_lora
from fedray.config import LoraSection

CPU = torch.device("cpu")


@given(st.integers(0, 2**63 - 1), st.floats(0.05, 0.95))
def test_the_mask_is_a_function_of_key_and_name(key: int, p: float) -> None:
    before = torch.get_rng_state()
    mask = dropout_mask(key, "layer", (50, 80), p, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(mask, dropout_mask(key, "layer", (50, 80), p, CPU))
    # 4000 draws: five standard deviations are at most 5 · √(0.25 / 4000) = 0.04
    assert abs(mask.double().mean() - (1 - p)) < 0.04
    for other in (dropout_mask(key ^ 1, "layer", (50, 80), p, CPU), dropout_mask(key, "other", (50, 80), p, CPU)):
        # independent masks agree with probability p² + (1 − p)² <= 0.905
        assert (mask == other).double().mean() < 0.95


def test_kept_values_are_scaled_and_evaluation_changes_nothing() -> None:
    context = ForwardContext(nn.Identity())
    layer, x = KeyedDropout(0.25, "layer", context), torch.arange(1.0, 401.0)
    y = layer.train()(x)
    kept = y != 0
    torch.testing.assert_close(y[kept], x[kept] / 0.75)
    assert 0.6 < kept.double().mean() < 0.9
    assert layer.eval()(x) is x
    assert KeyedDropout(0.0, "layer", context).train()(x) is x


def test_a_new_key_gives_a_new_mask(make: Callable[..., PreTrainedModel], batch: dict[str, Tensor]) -> None:
    adapter = attach_lora(make("bert"), LoraSection(dropout=0.5))
    adapter.load("lora", adapter.read("lora") + 0.1)
    adapter.model.train()
    logits = []
    for key in (1, 2, 1):
        adapter.set_dropout_key(key)
        torch.manual_seed(len(logits))  # must not matter
        logits.append(adapter.model(**batch).logits)
    assert torch.equal(logits[0], logits[2])
    assert not torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_recomputation_repeats_the_masks(
    make: Callable[..., PreTrainedModel], batch: dict[str, Tensor], family: str
) -> None:
    """Activation checkpointing runs each block twice; gradients must be those of one pass."""
    gradients = []
    for checkpointing in (False, True):
        adapter = attach_lora(make(family), LoraSection(dropout=0.5), rest_rank=2, mixer="adaptive")
        adapter.load("lora", adapter.read("lora") + 0.1)
        adapter.load("rest", adapter.read("rest") + 0.2)
        if checkpointing:
            adapter.model.gradient_checkpointing_enable({"use_reentrant": False})
        adapter.model.train()
        adapter.set_dropout_key(5)
        adapter.model(**batch).logits.square().sum().backward()
        gradients.append([p.grad for p in adapter.model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)
