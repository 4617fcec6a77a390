"""Families of models whose layers or blocks are unlike others'."""

from typing import Any

import pytest
import torch
from families import tiny_family

from fedray.adapters.client_batch import CannotBatch, ClientBatch
from fedray.adapters.lora import attach_lora
from fedray.adapters.reft import attach_reft, find_blocks
from fedray.adapters.stacked import AdapterStack
from fedray.config import LoraSection, ReftSection
from fedray.errors import ConfigError

ROWS: dict[str, Any] = {
    "input_ids": torch.tensor([[257, 7, 9, 8, 258], [257, 3, 2, 1, 258]]),
    "attention_mask": torch.ones(2, 5, dtype=torch.long),
}

TARGETS = {
    "codegen": ("qkv_proj",),
    "ctrl": ("Wq", "Wv"),
    "deberta": ("in_proj",),
    "deepseek_v3": ("q_b_proj", "kv_b_proj"),
    "falcon_mamba": ("in_proj",),
    "gpt_bigcode": ("c_attn",),
    "mixtral": ("q_proj", "v_proj"),
    "mpnet": ("q", "v"),
    "openai-gpt": ("c_attn",),
    "phi3": ("qkv_proj",),
    "rwkv": ("key", "value", "receptance", "output"),
    "t5": ("q", "v"),
}


def test_models_without_linear_layers_are_refused() -> None:
    """FNet's blocks have linear layers, but none for query and value; XLNet's query is no layer."""
    from transformers import FNetConfig, FNetForSequenceClassification

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 9}
    with pytest.raises(ConfigError, match="no query and value layers are known for FNet.*dense"):
        attach_lora(FNetForSequenceClassification(FNetConfig(**sizes)), LoraSection())


def test_layers_that_peft_does_not_support() -> None:
    """Mamba's kernel reads the weight of `out_proj` without calling the layer; its input layer is the default."""
    from transformers import MambaConfig, MambaForCausalLM

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "state_size": 2, "vocab_size": 9}
    with pytest.raises(ConfigError, match=r"lora\.targets: .*'out_proj' is incompatible"):
        attach_lora(MambaForCausalLM(MambaConfig(**sizes)), LoraSection(targets=("out_proj",)))
    adapter = attach_lora(MambaForCausalLM(MambaConfig(**sizes)), LoraSection())
    assert list(adapter.targets) == ["backbone.layers.0.mixer.in_proj"]


@pytest.mark.parametrize("family", sorted(TARGETS))
def test_default_targets(family: str) -> None:
    task: Any = "classification" if family in ("deberta", "mpnet", "t5") else "causal_lm"
    with torch.device("meta"):
        model = tiny_family(family, task)
    adapter = attach_lora(model, LoraSection())
    assert {path.rpartition(".")[2] for path in adapter.targets} == set(TARGETS[family])


@pytest.mark.parametrize(
    ("family", "task", "first"),
    [
        ("gpt2", "causal_lm", "transformer.h.0"),
        ("openai-gpt", "causal_lm", "transformer.h.0"),  # its blocks return lists
        ("mamba", "causal_lm", "backbone.layers.0"),  # and these tensors
        ("t5", "classification", "transformer.encoder.block.0"),
        ("bart", "classification", "model.encoder.layers.0"),
        ("albert", "classification", "albert.encoder.albert_layer_groups.0"),
        ("mobilebert", "classification", "mobilebert.encoder.layer.0"),
        ("fnet", "classification", "fnet.encoder.layer.0"),
    ],
)
def test_blocks_are_edited(family: str, task: Any, first: str) -> None:
    """An intervention whose source has a bias of 1 changes the output."""
    model = tiny_family(family, task, spread=0.1)
    before = model(**ROWS).logits
    adapter = attach_reft(model, ReftSection(rank=2))
    assert next(iter(find_blocks(model))) == first
    torch.testing.assert_close(model(**ROWS).logits.shape, before.shape)
    for entry in adapter.groups[0].entries:
        if entry.slot.part == "b":
            entry.parameter.data.fill_(1.0)
    assert (model(**ROWS).logits - before).abs().max() > 1e-3
    model(**ROWS).logits.sum().backward()
    edited = [entry for entry in adapter.groups[0].entries if entry.slot.module.startswith(f"{first}.")]
    assert edited
    assert all(entry.parameter.grad.abs().max() > 0 for entry in edited)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("xlm", "no single list of blocks, but transformer.attentions"),
        ("funnel", "no single list of blocks, but funnel.encoder.blocks.0, funnel.encoder.blocks.1"),
    ],
)
def test_models_without_blocks(family: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"{message}.*adapter: lora"):
        attach_reft(tiny_family(family, "classification"), ReftSection())


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("squeezebert", "does not call transformer.encoder.layers.0"),
        ("longformer", r"shape \(2, 8, 32\) for 2 examples of 5 tokens"),  # padded to its window
        ("xlnet", r"shape \(5, 2, 32\) for 2 examples of 5 tokens"),
        ("canine", r"shape \(2, 1, 32\) for 2 examples of 5 tokens"),  # 4 characters are one
    ],
)
def test_blocks_whose_outputs_are_not_one_vector_per_token(family: str, message: str) -> None:
    model = tiny_family(family, "classification")
    attach_reft(model, ReftSection())
    with pytest.raises(ConfigError, match=f"{message}.*adapter: lora"):
        model(**ROWS)


@pytest.mark.parametrize("family", ["bart", "marian"])
def test_a_lone_decoder_has_no_lora_where_it_would_read_an_encoder(family: str) -> None:
    """Its attention to an encoder is never called: its parameters would be counted and sent, and never trained."""
    adapter = attach_lora(tiny_family(family, "causal_lm"), LoraSection())
    assert len(adapter.targets) == 2 * 2  # query and value of two blocks
    assert not [path for path in adapter.targets if "encoder_attn" in path]
    whole = attach_lora(tiny_family("bart", "classification"), LoraSection())
    assert len(whole.targets) == 2 * 2 + 2 * 2 * 2  # an encoder's blocks have one attention, a decoder's two


def pass_of_two(family: str, dropout: float, targets: tuple[str, ...] = ()) -> torch.Tensor:
    """Two clients' rows through one stack, in training mode."""
    adapter = attach_lora(tiny_family(family, "classification"), LoraSection(dropout=dropout, targets=targets))
    stack = AdapterStack(adapter, 2)
    with stack.installed():
        adapter.model.train()
        stack.use(stack.values, [0, 1])
        adapter.context.client_batch = ClientBatch((0, 1), ((1, 5), (1, 5)), 1, "cpu", (3, 4))
        logits: torch.Tensor = adapter.model(**ROWS).logits
    return logits


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_layers_that_cannot_be_divided_among_clients(dropout: float) -> None:
    """XLNet's layers and Longformer's read [tokens, examples, d]."""
    with pytest.raises(CannotBatch, match="not one row per example"):
        pass_of_two("xlnet", dropout, ("layer_1",))
    with pytest.raises(CannotBatch, match="not one row per example"):
        pass_of_two("longformer", dropout)


def test_layers_that_read_one_token_after_another() -> None:
    """OPT's feed-forward layers read [examples · tokens, d], and are divided all the same."""
    assert pass_of_two("opt", 0.5, ("fc1",)).isfinite().all()
