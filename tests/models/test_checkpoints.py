"""A model that fedray loads gives the logits of transformers' own `from_pretrained`, in whatever form it was saved."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from fedray.adapters.full import attach_full
from fedray.config import ModelConfig
from fedray.errors import ConfigError
from fedray.models.architecture import architecture
from fedray.models.backbone import load_backbone, meta_backbone
from fedray.types import Task

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {},
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
    "electra": {"embedding_size": 8},
    "deberta-v2": {},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "bloom": {"n_layer": 2, "n_head": 2},
    "falcon": {},
    "llama": {"num_key_value_heads": 1},
    "mistral": {"num_key_value_heads": 1},
    "qwen2": {"num_key_value_heads": 1},
    "gemma": {"num_key_value_heads": 1, "head_dim": 8},
    "phi3": {"num_key_value_heads": 1},
    "bart": {
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    },
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0},
}
CAUSAL = (
    *("gpt2", "gpt_neox", "opt", "bloom", "falcon", "llama", "mistral", "qwen2", "gemma", "phi3", "bert", "roberta"),
    "electra",
)
BATCH = {
    "input_ids": torch.tensor([[5, 9, 7, 8, 2], [6, 4, 2, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
}
AUTO = {"causal_lm": AutoModelForCausalLM, "classification": AutoModelForSequenceClassification}


def drawn(family: str, task: Task, **fields: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(family, **{**SIZES, "num_labels": 3, **FAMILIES[family], **fields})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model: PreTrainedModel = AUTO[task].from_config(config)
        for parameter in model.parameters():  # no bias of zero, no scale of one
            parameter.data.normal_(std=0.3)
    return model.eval()


def load(folder: Path, cache: Path, task: Task, **fields: Any) -> PreTrainedModel:
    """The model, after comparing what is tied and what is counted with the model on the meta device."""
    section = ModelConfig(path=str(folder), **fields)
    arch = architecture(section, task, 3, None, None)
    model = load_backbone(section, arch, task, seed=0, device="cpu", cache_dir=cache)
    sizes = [
        [(name, parameter.shape) for name, parameter in found.named_parameters()]
        for found in (model, meta_backbone(arch, task))
    ]
    assert sizes[0] == sizes[1]
    layouts = [attach_full(found).layout("full") for found in (model, meta_backbone(arch, task))]
    assert layouts[0] == layouts[1]
    return model


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**BATCH).logits
    return found


def expected(folder: Path, task: Task) -> Tensor:
    return logits(AUTO[task].from_pretrained(folder).eval())


def write(folder: Path, form: str, state: dict[str, Tensor]) -> None:
    """Write a folder's weights in one of the forms that transformers reads."""
    for file in folder.glob("model*.safetensors"):
        file.unlink()
    suffix, stem = ("safetensors", "model") if "safetensors" in form else ("bin", "pytorch_model")
    names = list(state)
    half = len(names) // 2
    parts = [names[:half], names[half:]] if "sharded" in form else [names]
    files = [f"{stem}-{i + 1:05d}-of-00002.{suffix}" for i in range(2)] if "sharded" in form else [f"{stem}.{suffix}"]
    for file, part in zip(files, parts, strict=True):
        held = {name: state[name] for name in part}
        if suffix == "bin":
            torch.save(held, folder / file)
        else:
            copies = {name: tensor.clone().contiguous() for name, tensor in held.items()}
            save_file(copies, folder / file, metadata={"format": "pt"})
    if "sharded" in form:
        places = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        index = {"metadata": {"total_size": 1}, "weight_map": places}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("family", "task"),
    [*((family, "classification") for family in FAMILIES), *((family, "causal_lm") for family in CAUSAL)],
)
def test_a_saved_model_has_the_same_logits(tmp_path: Path, family: str, task: Task) -> None:
    """Whatever the family ties by default; encoders are read forwards as language models, here as in the file."""
    drawn(family, task, **({"is_decoder": True} if task == "causal_lm" else {})).save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model", tmp_path / "cache", task)
    assert torch.equal(logits(model), expected(tmp_path / "model", task))


FORMS = ("safetensors", "sharded safetensors", "bin", "sharded bin")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "held", ["own head", "equal head", "no head", "no embeddings", "no tie in the configuration", "base names"]
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_only_what_the_file_lacks_is_tied(tmp_path: Path, family: str, held: str, form: str) -> None:
    """The configuration ties the output layer to the embeddings (but once); the file decides whether they are.

    `own head`: both are there, and differ: nothing is tied. `equal head`: as every .bin file of a tied model has it.
    `base names`: a head of its own beside a base model whose names lack the prefix.
    """
    folder = tmp_path / "model"
    tied = held != "no tie in the configuration"
    drawn(family, "causal_lm", tie_word_embeddings=tied).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    state = {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}
    embeddings = {"llama": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}[family]
    if held in ("own head", "base names"):
        state["lm_head.weight"] = torch.randn(state[embeddings].shape, generator=torch.Generator().manual_seed(1))
    elif held == "no head":
        del state["lm_head.weight"]
    elif held == "no embeddings":
        del state[embeddings]
    if held == "base names":
        state = {name.removeprefix(f"{model.base_model_prefix}."): tensor for name, tensor in state.items()}
    write(folder, form, state)
    loaded = load(folder, tmp_path / "cache", "causal_lm")
    assert torch.equal(logits(loaded), expected(folder, "causal_lm"))
    shared = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert shared == (held in ("equal head", "no head", "no embeddings"))
    file = next((tmp_path / "cache").rglob("*.safetensors"))
    assert sum("lm_head" in name or "embed_tokens" in name or "wte" in name for name in load_file(file)) == 2 - shared


def test_ties_of_three(tmp_path: Path) -> None:
    """T5 ties both embeddings to a shared one: one that the file holds with other values stays apart."""
    folder = tmp_path / "model"
    drawn("t5", "classification").save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    own = {"transformer.decoder.embed_tokens.weight": torch.randn(40, 16)}
    write(folder, "safetensors", state | own)
    model = load(folder, tmp_path / "cache", "classification")
    assert torch.equal(logits(model), expected(folder, "classification"))
    base = model.transformer
    assert base.encoder.embed_tokens.weight is base.shared.weight
    assert base.decoder.embed_tokens.weight is not base.shared.weight


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_added_tokens(tmp_path: Path, family: str, tied: bool) -> None:
    folder = tmp_path / "model"
    model = drawn(family, "causal_lm", tie_word_embeddings=tied)
    model.resize_token_embeddings(47)
    model.save_pretrained(folder)
    loaded = load(folder, tmp_path / "cache", "causal_lm")
    assert torch.equal(logits(loaded), expected(folder, "causal_lm"))
    assert logits(loaded).shape[-1] == 47


def test_embeddings_that_the_configuration_does_not_know_of(tmp_path: Path) -> None:
    """transformers refuses to load such a model; it must not become one with random embeddings."""
    folder = tmp_path / "model"
    drawn("llama", "causal_lm").save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.cat([state[name], torch.ones(7, 16)])
    write(folder, "safetensors", state)
    with pytest.raises(RuntimeError):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ConfigError, match=r"embed_tokens.*should be \(40, 16\).*model.config.*vocab_size"):
        load(folder, tmp_path / "cache", "causal_lm")
    assert logits(load(folder, tmp_path / "cache", "causal_lm", config={"vocab_size": 47})).shape[-1] == 47


def test_what_is_untied_trains_by_itself(tmp_path: Path) -> None:
    """The adapter `full` has both tensors, on the meta device as well (compared in `load`), and its values are kept."""
    folder = tmp_path / "model"
    drawn("llama", "causal_lm", tie_word_embeddings=True).save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    write(folder, "safetensors", state | {"lm_head.weight": torch.ones(40, 16)})
    model = load(folder, tmp_path / "cache", "causal_lm")
    adapter = attach_full(model)
    views = adapter.layout("full").views(adapter.read("full"))
    assert (views["lm_head.weight.tensor"] == 1).all()
    assert isinstance(model.get_parameter("model.embed_tokens.weight"), nn.Parameter)
    assert not (views["model.embed_tokens.weight.tensor"] == 1).any()
