"""Folders that hold more than a plain model: a peft adapter, the other parts of a multimodal model, a GGUF file."""

import json
import logging
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import peft
import pytest
import torch
from families import tiny_family
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from fedray.adapters.lora import attach_lora
from fedray.config import LoraSection, ModelConfig
from fedray.errors import ConfigError
from fedray.models.architecture import architecture
from fedray.models.backbone import load_backbone, meta_backbone
from fedray.models.checkpoints import stored
from fedray.models.tokenizer import load_tokenizer
from fedray.types import Task
from tests.models.test_checkpoints import BATCH, drawn, logits

LINEAR = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
"""What llama.cpp calls the weights of a block."""


def load(section: ModelConfig, cache: Path, task: Task) -> PreTrainedModel:
    arch = architecture(section, task, 3, None, 0)
    return load_backbone(section, arch, task, seed=0, device="cpu", cache_dir=cache)


def save_adapter(folder: Path, base: str | None) -> None:
    adapted = peft.get_peft_model(drawn("llama", "causal_lm"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(folder)
    file = folder / "adapter_config.json"
    fields = json.loads(file.read_text()) | {"base_model_name_or_path": base, "task_type": "CAUSAL_LM"}
    file.write_text(json.dumps(fields))


@pytest.mark.parametrize("task", ["causal_lm", "classification"])
def test_an_adapter_beside_a_model_stays_out(tmp_path: Path, caplog: pytest.LogCaptureFixture, task: Task) -> None:
    """transformers would put peft's layers into the model, at which fedray's own fail."""
    folder = tmp_path / "model"
    drawn("llama", task).save_pretrained(folder)
    auto = AutoModelForCausalLM if task == "causal_lm" else AutoModelForSequenceClassification
    expected = logits(auto.from_pretrained(folder).eval())
    save_adapter(folder, str(folder))
    with caplog.at_level(logging.WARNING, logger="fedray"):
        model = load(ModelConfig(path=str(folder)), tmp_path / "cache", task)
    assert "holds a peft adapter besides the model; only the model is used" in caplog.text
    assert torch.equal(logits(model), expected)
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert len(attach_lora(model, LoraSection()).targets) == 4


def test_an_adapter_alone_names_its_model_and_the_remedy(tmp_path: Path) -> None:
    """The remedy works as the message gives it."""
    base = tmp_path / "base"
    drawn("llama", "causal_lm").save_pretrained(base)
    save_adapter(tmp_path / "only", str(base))
    with pytest.raises(ConfigError, match=r"no model but a peft adapter \(LORA\) of the model .*base.*merge") as told:
        architecture(ModelConfig(path=str(tmp_path / "only")), "causal_lm", 0, None, None)
    merging = str(told.value).rpartition("merged folder: ")[2].partition("; transformers")[0]
    eval(merging.replace("MERGED", str(tmp_path / "merged")), {"peft": peft})
    assert load(ModelConfig(path=str(tmp_path / "merged")), tmp_path / "cache", "causal_lm").config.vocab_size == 40


TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "head_dim": 8,
    "vocab_size": 60,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 28,
    "patch_size": 14,
}
QWEN = {"depth": 1, "num_heads": 2, "embed_dim": 16, "out_hidden_size": 16, "mlp_ratio": 2}
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
MULTIMODAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma3": ({}, {}),
    "mistral3": ({"model_type": "mistral"}, {"model_type": "pixtral"}),
    "llava": ({"model_type": "llama"}, {"model_type": "clip_vision_model"}),
    "qwen2_vl": (MROPE, QWEN),
    "qwen2_5_vl": (MROPE, QWEN),
    "llama4": (
        {"intermediate_size_mlp": 24, "num_local_experts": 2},
        {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
    ),
}


def multimodal(family: str, **fields: Any) -> PreTrainedModel:
    text, vision = MULTIMODAL[family]
    tokens = {
        name: 50 + i
        for i, name in enumerate(
            ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "image_token_index")
        )
        if name in AutoConfig.for_model(family).to_dict()
    }
    config = AutoConfig.for_model(family, text_config=TEXT | text, vision_config=VISION | vision, **tokens, **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForImageTextToText.from_config(config)
    return model.eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", sorted(MULTIMODAL))
def test_the_language_part_of_a_multimodal_model(tmp_path: Path, family: str, tied: bool) -> None:
    """On text alone it has the whole model's logits, whether its output layer is tied or not."""
    multimodal(family, tie_word_embeddings=tied).save_pretrained(tmp_path / "model")
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").eval()
    section = ModelConfig(path=str(tmp_path / "model"))
    model = load(section, tmp_path / "cache", "causal_lm")
    assert torch.equal(logits(model)[0], logits(whole)[0])
    assert torch.allclose(logits(model)[1, :3], logits(whole)[1, :3], atol=1e-6)
    names = [name for name, _ in model.named_parameters()]
    assert not any("vision" in name or "visual" in name for name in names)
    assert names == [
        n for n, _ in meta_backbone(architecture(section, "causal_lm", 0, None, 0), "causal_lm").named_parameters()
    ]
    shared = [found.get_output_embeddings().weight is found.get_input_embeddings().weight for found in (model, whole)]
    assert shared[0] == shared[1]
    text = BATCH["input_ids"][:1]
    first = model(input_ids=text[:, :3], use_cache=True)
    with torch.no_grad():
        then = model(input_ids=text[:, 3:], past_key_values=first.past_key_values, use_cache=True).logits
    assert torch.allclose(then, logits(whole)[:1, 3:], atol=1e-6)
    assert int(model.generate(input_ids=text, max_new_tokens=1, do_sample=False)[0, -1]) == int(
        logits(whole)[0, -1].argmax()
    )
    classifier = load(section, tmp_path / "cache", "classification")
    states = classifier.base_model(**BATCH)[0]
    head: Any = getattr(classifier, "classifier", None) or classifier.score
    expected = head(torch.stack([states[0, 4], states[1, 2]]))
    assert torch.allclose(classifier(**BATCH).logits, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("of_blocks", "of_head"),
    [("language_model.model.", "language_model.lm_head."), ("model.language_model.", "lm_head.")],
)
@pytest.mark.parametrize("family", ["gemma3", "mistral3", "qwen2_vl"])
def test_names_of_a_language_part(tmp_path: Path, family: str, of_blocks: str, of_head: str) -> None:
    """Older and newer checkpoints call it differently."""
    folder = tmp_path / "model"
    model = multimodal(family, tie_word_embeddings=False)
    model.save_pretrained(folder)
    expected = logits(load(ModelConfig(path=str(folder)), tmp_path / "cache", "causal_lm"))
    state = {
        name.replace("model.language_model.", of_blocks).replace("lm_head.", of_head): value.contiguous()
        for name, value in model.state_dict().items()
    }
    assert sum(name.startswith((of_blocks, of_head)) for name in state) > 20
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(load(ModelConfig(path=str(folder)), tmp_path / "cache", "causal_lm")), expected)


def test_a_random_multimodal_model_names_its_language_part() -> None:
    section = ModelConfig(path="random", tokenizer="bytes", config={"model_type": "gemma3", "hidden_size": 16})
    with pytest.raises(ConfigError, match=r"model\.config\.model_type: gemma3 also reads images.*gemma3_text"):
        architecture(section, "causal_lm", 0, None, None)


def test_a_language_part_that_cannot_continue_text(tmp_path: Path) -> None:
    config = AutoConfig.for_model("clip", text_config=TEXT, vision_config=VISION)
    config.save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="clip_text_model, the language part of clip, cannot be built for the task"):
        architecture(ModelConfig(path=str(tmp_path / "model")), "causal_lm", 0, None, None)


def write_gguf(file: Path, model: PreTrainedModel, kind: gguf.GGMLQuantizationType) -> None:
    """Write a Llama as llama.cpp's converter does: halves of rotated heads interleaved, sentencepiece's byte tokens."""
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    letters = ["▁", *map(chr, range(97, 123))]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    words += [f"x{i}" for i in range(config.vocab_size - len(words))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([-float(i) for i in range(len(words))])
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (len(words) - 259)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for i in range(config.num_hidden_layers):
        names |= {f"model.layers.{i}.{ours}": f"blk.{i}.{theirs}" for ours, theirs in LINEAR.items()}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for ours, theirs in names.items():
        tensor: npt.NDArray[np.float32] = model.get_parameter(f"{ours}.weight").detach().numpy()
        for part, count in heads.items():
            if ours.endswith(part):
                tensor = tensor.reshape(count, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        of_tensor = kind if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(
            f"{theirs}.weight", gguf.quantize(np.ascontiguousarray(tensor), of_tensor), raw_dtype=of_tensor
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    """Quantised blocks are 32 values wide."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    return tiny_family("llama", "causal_lm", hidden_size=64, intermediate_size=96, vocab_size=300, **heads)


def gguf_logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.tensor([[1, 270, 265, 2]])).logits
    return found


def test_a_gguf_file_of_floats_is_the_model_itself(
    tmp_path: Path, llama: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    write_gguf(tmp_path / "model.gguf", llama, gguf.GGMLQuantizationType.F32)
    section = ModelConfig(path=str(tmp_path / "model.gguf"))
    with caplog.at_level(logging.WARNING, logger="fedray"):
        model = load(section, tmp_path / "cache", "causal_lm")
    assert torch.equal(gguf_logits(model), gguf_logits(llama))
    assert not [record for record in caplog.records if record.name.startswith("fedray")]
    tokenizer = load_tokenizer(section)
    assert len(tokenizer) == 300
    assert tokenizer.decode(tokenizer("hello").input_ids, skip_special_tokens=True).strip() == "hello"


@pytest.mark.parametrize("task", ["causal_lm", "classification"])
def test_a_quantised_gguf_file_says_what_it_becomes(
    tmp_path: Path, llama: PreTrainedModel, caplog: pytest.LogCaptureFixture, task: Task
) -> None:
    """16 matrices of eight bits in blocks of 32, and five norms. Rounding changes a logit by about a hundredth."""
    file = tmp_path / "model.gguf"
    write_gguf(file, llama, gguf.GGMLQuantizationType.Q8_0)
    with caplog.at_level(logging.WARNING, logger="fedray"):
        model = load(ModelConfig(path=str(file), dtype="bfloat16"), tmp_path / "cache", task)
    assert "Q8_0 (16 tensors), F32 (5 tensors); they are dequantised to bfloat16" in caplog.text
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    if task == "causal_lm":
        wide = load(ModelConfig(path=str(file)), tmp_path / "cache", task)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).eval()
        assert torch.equal(gguf_logits(wide), gguf_logits(plain))
        difference = (gguf_logits(wide) - gguf_logits(llama)).abs().max()
        assert 0 < difference < 0.03


def test_without_the_package_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(stored, "find_package", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package gguf; install the extra .*fedray\[gguf\]"):
        architecture(ModelConfig(path=str(tmp_path / "model.gguf")), "causal_lm", 0, None, None)


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"something else")
    with pytest.raises(ConfigError, match=r"model\.path: no configuration could be read from .*model\.gguf"):
        architecture(ModelConfig(path=str(tmp_path / "model.gguf")), "causal_lm", 0, None, None)
