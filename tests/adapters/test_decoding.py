"""Decoding steps: what an adapter decided for a prompt holds for the text that is generated from it, whatever kind of
cache the model has."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fedray.adapters.adapter import Adapter
from fedray.adapters.lora import attach_lora
from fedray.adapters.reft import attach_reft
from fedray.config import LoraSection, ReftSection
from fedray.models.labels import labelled

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 50, "pad_token_id": 0}
FAMILIES: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 4},
    "mamba2": {"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1},
    "rwkv": {"attention_hidden_size": 16, "context_length": 40},
    "opt": {"ffn_dim": 24, "num_attention_heads": 2, "word_embed_proj_dim": 8, "max_position_embeddings": 40},
    "bloom": {"n_head": 2},
}
NEW = 4


def tiny(family: str) -> PreTrainedModel:
    config = AutoConfig.for_model(family, **{**SMALL, **FAMILIES[family]})
    config.initializer_range = 0.2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def attached(kind: str, model: PreTrainedModel) -> Adapter:
    """An adapter whose values matter, and that looks at where the prompt ends."""
    if kind == "similarity":
        adapter = attach_lora(model, LoraSection(rank=2, alpha=8.0), rest_rank=2, mixer="similarity")
    else:
        adapter = attach_reft(model, ReftSection(rank=2, positions="f1+l1"))
    rng = np.random.default_rng(0)
    for name in adapter.names:
        adapter.load(name, rng.normal(0, 0.5, adapter.layout(name).size).astype(np.float32))
    return adapter


@pytest.mark.parametrize("kind", ["similarity", "reft"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache_is_as_without(family: str, kind: str) -> None:
    """Token by token with the model's cache, against the whole text anew for every token, whose labels tell where the
    prompt of 5 tokens ends."""
    model = tiny(family)
    attached(kind, model)
    text = prompt = torch.tensor([[3, 4, 5, 6, 9]])
    mask = torch.ones_like(prompt)
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = model.generate(input_ids=prompt, attention_mask=mask, **options)
    for _ in range(NEW):
        labels = torch.full_like(text, -100)
        labels[:, prompt.shape[1] :] = 1
        with torch.no_grad(), labelled(labels):
            logits = model(input_ids=text, attention_mask=torch.ones_like(text), use_cache=False).logits
        text = torch.cat([text, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(found, text)
