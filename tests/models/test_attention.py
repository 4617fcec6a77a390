"""bfloat16 on a CPU: attention of short sequences is trained in float32, and nothing else changes."""

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fedray.config import TierConfig
from fedray.models.attention import LONG, NAME, short_in_float32, train_short_in_float32
from fedray.training.base_model import as_held
from tests.models.test_backbone import FAMILIES, drawn_model

TOKENS = 12


def drawn(tokens: int = TOKENS, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    parts = torch.randn(3, 2, 4, tokens, 8, generator=generator).to(dtype)
    query, key, value = (part.clone().requires_grad_() for part in parts)
    return query, key, value


def mask(kind: str) -> Tensor | None:
    if kind == "none":
        return None
    seen = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril().expand(2, 1, TOKENS, TOKENS)
    return seen if kind == "bool" else torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill(~seen, -1e9)


def gradients(output: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 1, output.numel()).view(output.shape).bfloat16()  # what reaches a bfloat16 output
    return torch.autograd.grad((output.float() * weights).sum(), inputs)


@pytest.mark.parametrize("kind", ["none", "bool", "added"])
def test_it_is_float32_attention_rounded_once(kind: str) -> None:
    inputs = drawn()
    output, _ = short_in_float32(nn.Module(), *inputs, mask(kind), is_causal=True)
    wide = tuple(part.detach().float().requires_grad_() for part in inputs)
    allowed = mask(kind)
    added = allowed.float() if allowed is not None and allowed.is_floating_point() else allowed
    expected = F.scaled_dot_product_attention(*wide, attn_mask=added, is_causal=added is None).transpose(1, 2)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected.to(torch.bfloat16))
    for found, exact in zip(gradients(output, inputs), gradients(expected, wide), strict=True):
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, exact.to(torch.bfloat16))


@pytest.mark.parametrize("case", ["long", "not trained", "float32", "position bias"])
def test_all_else_is_left_to_transformers(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []

    def attention(query: Tensor, *args: Any, **options: Any) -> Tensor:
        seen.append(query.dtype)
        return query

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    tokens = LONG if case == "long" else TOKENS
    inputs = drawn(tokens, dtype=torch.float32 if case == "float32" else torch.bfloat16)
    options = {"position_bias": torch.zeros(1, 4, tokens, tokens).bfloat16()} if case == "position bias" else {}
    with torch.set_grad_enabled(case != "not trained"):
        query, key, value = (part * 1 for part in inputs)  # as a layer makes them
        short_in_float32(nn.Module(), query, key, value, None, **options)
    short_in_float32(nn.Module(), *drawn(LONG - 1), None)
    assert seen == [inputs[0].dtype, torch.float32]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_model_learns_as_before_within_its_precision(family: str) -> None:
    """Padded on the right, grouped heads where the family has them: logits without training are the same bits; the
    gradient is at least as near to that of float32 as bfloat16's was, up to a tenth."""
    batch = {"input_ids": torch.randint(1, 50, (3, TOKENS), generator=torch.Generator().manual_seed(0))}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1, 7:] = 0
    plain, changed = (drawn_model(family, "classification", torch.bfloat16).eval() for _ in range(2))
    exact = drawn_model(family, "classification").eval()
    exact.load_state_dict(plain.state_dict())
    train_short_in_float32(changed)
    assert changed.config._attn_implementation == NAME
    with torch.no_grad():
        assert torch.equal(plain(**batch).logits, changed(**batch).logits)
    first, mine, bfloat = (
        torch.cat([gradient.flatten().float() for gradient in _gradients(model, batch)])
        for model in (exact, changed, plain)
    )
    assert not torch.equal(mine, bfloat)
    assert (mine - first).norm() <= 1.1 * (bfloat - first).norm() + 1e-6
    assert (mine - first).norm() <= 0.1 * first.norm()


def _gradients(model: PreTrainedModel, batch: dict[str, Tensor]) -> list[Tensor]:
    loss = model(**batch, labels=torch.tensor([0, 1, 2])).loss
    named = [(name, parameter) for name, parameter in model.named_parameters() if "weight" in name]
    found = torch.autograd.grad(loss, [parameter for _, parameter in named], allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_tier_on_a_cpu_holds_it_so(checkpointing: bool) -> None:
    """With checkpointing the forward pass that is run again takes the same branch: the same gradients."""

    def llama() -> PreTrainedModel:
        return drawn_model("llama", "causal_lm", torch.bfloat16, attention_dropout=0.0)

    tier = TierConfig(share=1.0, activation_checkpointing=checkpointing)
    batch = {"input_ids": torch.randint(1, 50, (2, TOKENS), generator=torch.Generator().manual_seed(1))}
    held = as_held(llama(), tier, "cpu").train()
    assert held.config._attn_implementation == NAME
    plain = llama().train()
    train_short_in_float32(plain)
    held, plain = (model.requires_grad_(True) for model in (held, plain))
    mine, expected = (model(**batch, labels=batch["input_ids"], use_cache=False).loss for model in (held, plain))
    found = torch.autograd.grad(mine, list(held.parameters()))
    wanted = torch.autograd.grad(expected, list(plain.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert as_held(llama(), tier, "cuda").config._attn_implementation == "sdpa"


def test_sparse_attention_stays_sparse() -> None:
    """Its code asks whether the attention is `sdpa`, and attends to every token otherwise."""
    sparse: dict[str, Any] = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 24,
        "index_topk": 4,
    }
    config = AutoConfig.for_model("deepseek_v32", vocab_size=50, **sparse)
    with torch.device("meta"):
        tiny = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert tiny.config._attn_implementation == "sdpa"
    train_short_in_float32(tiny)
    assert tiny.config._attn_implementation == "sdpa"


def test_old_code_is_left_alone_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    with torch.device("meta"):
        falcon = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("falcon", hidden_size=16, num_attention_heads=2, num_hidden_layers=1),
            dtype=torch.bfloat16,
        )
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        train_short_in_float32(falcon)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert falcon.config._attn_implementation != NAME
    assert not caplog.records


@pytest.mark.parametrize("why", ["float32", "eager"])
def test_other_models_are_left_alone(why: str) -> None:
    model = drawn_model("llama", "causal_lm", torch.float32 if why == "float32" else torch.bfloat16)
    if why == "eager":
        model.set_attn_implementation("eager")
    before = model.config._attn_implementation
    train_short_in_float32(model)
    assert model.config._attn_implementation == before
