"""Tiny models of every family, random but with a seed; nothing is downloaded."""

from collections.abc import Callable

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

WIDTH, VOCABULARY, LABELS = 16, 50, 3
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
FAMILIES = {
    "bert": {},
    "roberta": {"type_vocab_size": 1},
    "llama": {"num_key_value_heads": 1, "eos_token_id": 1, "bos_token_id": 2},
    "gpt_neox": {"eos_token_id": 1, "bos_token_id": 2},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "eos_token_id": 1, "bos_token_id": 2},
    "qwen2": {"num_key_value_heads": 1, "eos_token_id": 1, "bos_token_id": 2},
}


def tiny(family: str, causal: bool = False, **fields: object) -> PreTrainedModel:
    """The family's model with weights large enough that every layer matters, without dropout, evaluating."""
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if family in ("bert", "roberta") else {}
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], **off, "num_labels": LABELS, **fields})
    config.initializer_range = 0.2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        auto = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
        return auto.from_config(config).eval()


@pytest.fixture(scope="session")
def make() -> Callable[..., PreTrainedModel]:
    return tiny


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Four examples of up to seven tokens, padded on the right; no token is the padding token by accident."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, VOCABULARY, (4, 7), generator=generator)
    mask = torch.ones_like(tokens)
    mask[0, 4:] = 0
    mask[2, 1:] = 0
    return {"input_ids": tokens * mask, "attention_mask": mask}


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)
