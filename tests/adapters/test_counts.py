"""Parameter counts that the papers print, from public model configurations on the meta device (no weights)."""

import numpy as np
import pytest
import torch
from paper_models import LLAMA_2_7B, LLAMA_3_2_3B, LLAMA_3_8B
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from fedray.adapters.adapter import Adapter
from fedray.adapters.lora import attach_lora
from fedray.adapters.reft import attach_reft
from fedray.config import LoraSection, ReftSection

LLAMA = {"llama-3.2-3b": LLAMA_3_2_3B, "llama-3-8b": LLAMA_3_8B, "llama-2-7b": LLAMA_2_7B}


def llama(name: str) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA[name]))


def roberta_large() -> PreTrainedModel:
    fields = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    config = AutoConfig.for_model("roberta", **fields, vocab_size=50265, max_position_embeddings=514, num_labels=2)
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config)


def total(adapter: Adapter) -> int:
    return sum(parameter.numel() for parameter in adapter.model.parameters())


@pytest.mark.parametrize(
    ("model", "rank", "count"),
    [("llama-3.2-3b", 8, 2_752_960), ("llama-3.2-3b", 32, 11_011_840), ("llama-3-8b", 8, 4_194_816)],
)
def test_fedreft(model: str, rank: int, count: int) -> None:
    """layers · 2 positions · (R [r, d] + W [r, d] + b [r]): 28 · 2 · (2·8·3072 + 8) = 2,752,960, and so on."""
    adapter = attach_reft(llama(model), ReftSection(rank=rank))
    assert adapter.num_trainable() == adapter.layout("reft").size == count


def test_fedit_and_ffa_lora() -> None:
    """r = 32, per layer: A and B of q (3072 → 3072), k and v (→ 1024), o (3072 → 3072), gate and up (→ 8192),
    down (8192 → 3072): 32 · (6144 + 2·4096 + 6144 + 2·11264 + 11264) = 1,736,704; times 28 layers."""
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    adapter = attach_lora(llama("llama-3.2-3b"), LoraSection(rank=32, targets=targets))
    assert adapter.num_trainable() == 28 * 1_736_704 == 48_627_712
    adapter.set_trainable("lora.B")  # 28 · 32 · (3072 + 2·1024 + 3072 + 2·8192 + 3072)
    assert adapter.num_trainable() == 24_772_608


def test_roberta_large() -> None:
    """24 layers · 2 targets · 8 · (1024 + 1024) = 786,432; head: 1024² + 1024 + 2·1024 + 2 = 1,051,650."""
    adapter = attach_lora(roberta_large(), LoraSection(rank=8))
    assert adapter.num_trainable() == 786_432 + 1_051_650 == 1_838_082
    adapter.set_trainable("lora.B", "head")
    assert adapter.num_trainable() == 1_444_866
    adapter = attach_lora(roberta_large(), LoraSection(rank=8), rest_rank=8)  # FedDPA: two LoRA
    adapter.set_trainable("lora", "rest", "head")
    assert adapter.num_trainable() == 2_624_514


def test_fedalt() -> None:
    """Trained: 32 · 2 · (8 · 8192 + 2 · 4096) = 4,718,592. In all: that, the frozen rest's 32 · 2 · 8 · 8192, and the
    base's 6,738,415,616 (both embeddings, 32 · (attention 4 · 4096², MLP 3 · 4096 · 11008, two norms), last norm)."""
    base = 2 * 32000 * 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096
    adapter = attach_lora(llama("llama-2-7b"), LoraSection(rank=8, alpha=32), rest_rank=8, mixer="adaptive")
    assert adapter.num_trainable() == 4_718_592
    assert total(adapter) == base + 4_718_592 + 32 * 2 * 8 * 8192 == 6_747_328_512


def test_masked_rows_shrink_a_model_without_weights() -> None:
    """FedHFT, ρ = 0.5 on RoBERTa-large: A stays, B halves: 24 · 2 · (8·1024 + 8·512)."""
    adapter = attach_lora(roberta_large(), LoraSection(rank=8), rest_rank=8, rest_dropout=False)
    adapter.set_trainable("lora")
    adapter.set_rows({path: np.arange(0, 1024, 2) for path in adapter.targets})
    assert adapter.num_trainable() == adapter.layout("lora").size == 24 * 2 * 8 * (1024 + 512)
