import json
import logging
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from limits import files_of_at_most
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    PreTrainedModel,
)

from fedray.config import ModelConfig
from fedray.errors import ConfigError
from fedray.models import backbone
from fedray.models.architecture import architecture
from fedray.models.backbone import load_backbone, max_positions, meta_backbone, missing_head
from fedray.types import Task

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {"classifier_dropout": 0.3},
    "roberta": {"type_vocab_size": 1},
    "llama": {"num_key_value_heads": 1, "attention_dropout": 0.2},
    "gpt_neox": {"hidden_dropout": 0.2},
    "qwen2": {"num_key_value_heads": 1},
}
BATCH = {
    "input_ids": torch.tensor([[5, 9, 7, 8], [6, 4, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
}


def drawn_model(family: str, task: Task, dtype: torch.dtype = torch.float32, **fields: Any) -> PreTrainedModel:
    """A model with seeded random weights."""
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], "num_labels": 3, "pad_token_id": 0, **fields})
    config.initializer_range = 0.2
    auto = AutoModelForCausalLM if task == "causal_lm" else AutoModelForSequenceClassification
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model: PreTrainedModel = auto.from_config(config, dtype=dtype)
    return model


def save(folder: Path, family: str, task: Task, **fields: Any) -> Path:
    """Such a model as anybody would save it."""
    drawn_model(family, task, **fields).save_pretrained(folder)
    return folder


def load(folder: Path | str, cache: Path, task: Task = "classification", num_labels: int = 3, **fields: Any) -> Any:
    model = ModelConfig(path=str(folder), **fields)
    arch = architecture(model, task, num_labels, None, 0)
    return load_backbone(model, arch, task, seed=0, device="cpu", cache_dir=cache)


def random_bert(**fields: Any) -> ModelConfig:
    return ModelConfig(path="random", tokenizer="bytes", config={"model_type": "bert", **SIZES, **fields})


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_logits_are_those_of_from_pretrained(tmp_path: Path, family: str) -> None:
    """Also in training mode: the base's dropout is off."""
    folder = save(tmp_path / "model", family, "classification")
    expected = AutoModelForSequenceClassification.from_pretrained(folder).eval()(**BATCH).logits
    for _ in range(2):  # first written, then only mapped
        model = load(folder, tmp_path / "cache")
        assert not model.training
        assert torch.equal(model(**BATCH).logits, expected)
        assert torch.equal(model.train()(**BATCH).logits, expected)
        assert {parameter.requires_grad for parameter in model.parameters()} == {False}
        assert missing_head(model) == ()
    assert len(list((tmp_path / "cache" / "backbones").glob("*.safetensors"))) == 1


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen2"])
def test_language_models_tied_and_untied(tmp_path: Path, family: str, tied: bool) -> None:
    folder = save(tmp_path / "model", family, "causal_lm", tie_word_embeddings=tied)
    expected = AutoModelForCausalLM.from_pretrained(folder).eval()(**BATCH).logits
    model = load(folder, tmp_path / "cache", "causal_lm")
    assert torch.equal(model(**BATCH).logits, expected)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


def test_buffers_that_no_state_dict_has_are_right(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "llama", "causal_lm")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    model = load(folder, tmp_path / "cache", "causal_lm", dtype="bfloat16")
    buffers = dict(model.named_buffers())
    assert "model.rotary_emb.inv_freq" in buffers
    assert not {"model.rotary_emb.inv_freq"} & set(model.state_dict())
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffers[name], buffer), name
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_write_stays_in_its_process(tmp_path: Path) -> None:
    """Two processes map one file; the other one writes in place, and neither this one nor the file notices."""
    folder = save(tmp_path / "model", "bert", "classification")
    model = load(folder, tmp_path / "cache")
    file = next((tmp_path / "cache" / "backbones").glob("*.safetensors"))
    content, weight = file.read_bytes(), model.bert.embeddings.word_embeddings.weight
    before = weight.clone()
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))]
    assert mapped, "the weights are a private copy, not a mapping of the node's file"
    code = f"""
from fedray.config import ModelConfig
from fedray.models.architecture import architecture
from fedray.models.backbone import load_backbone
model = ModelConfig(path={str(folder)!r})
arch = architecture(model, "classification", 3, None, 0)
loaded = load_backbone(model, arch, "classification", 0, "cpu", {str(tmp_path / "cache")!r})
weight = loaded.bert.embeddings.word_embeddings.weight
print(float(weight.double().sum()))
weight.fill_(7.0)
print(float(weight.double().mean()))
"""
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert float(other[0]) == pytest.approx(float(before.double().sum()), abs=1e-9)
    assert float(other[1]) == 7.0
    assert torch.equal(weight, before)
    assert file.read_bytes() == content
    weight.fill_(3.0)
    assert file.read_bytes() == content


def test_the_file_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path / "model", "bert", "classification")
    load(folder, tmp_path / "cache")

    def fail(*_: Any) -> None:
        raise AssertionError("written twice")

    monkeypatch.setattr(backbone, "_first_weights", fail)
    load(folder, tmp_path / "cache")
    for changed in ({"num_labels": 4}, {"dtype": "bfloat16"}):
        with pytest.raises(AssertionError, match="written twice"):
            load(folder, tmp_path / "cache", **changed)
    save(folder, "bert", "classification")  # the same folder with new files
    with pytest.raises(AssertionError, match="written twice"):
        load(folder, tmp_path / "cache")


def test_processes_that_start_together_write_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads stand for processes: the lock is a file's."""
    folder, calls, first = save(tmp_path / "model", "bert", "classification"), [], backbone._first_weights

    def slow(*args: Any) -> Any:
        calls.append(args)
        time.sleep(0.3)
        return first(*args)

    monkeypatch.setattr(backbone, "_first_weights", slow)
    with ThreadPoolExecutor(3) as pool:
        models = list(pool.map(lambda _: load(folder, tmp_path / "cache"), range(3)))
    assert len(calls) == 1
    assert torch.equal(models[0](**BATCH).logits, models[2](**BATCH).logits)


def test_a_failed_write_leaves_no_file(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "bert", "classification")
    with (
        files_of_at_most(1000),
        pytest.raises(ConfigError, match=r"data\.cache_dir: .* cannot be written: .*too large"),
    ):
        load(folder, tmp_path / "cache")
    assert not [*(tmp_path / "cache").rglob("*.safetensors"), *(tmp_path / "cache").rglob("*.part")]


def test_a_damaged_file_says_so(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "bert", "classification")
    load(folder, tmp_path / "cache")
    file = next((tmp_path / "cache").rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="delete this file"):
        load(folder, tmp_path / "cache")


HEADS = {
    "bert": {"classifier.weight", "classifier.bias"},
    "roberta": {f"classifier.{part}.{kind}" for part in ("dense", "out_proj") for kind in ("weight", "bias")},
    "llama": {"score.weight"},
    "gpt_neox": {"score.weight"},
    "qwen2": {"score.weight"},
}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_head_that_the_checkpoint_lacks_is_named(tmp_path: Path, family: str) -> None:
    """Its first values do not depend on the global generator, nor does loading move that."""
    config = AutoConfig.for_model(family, **SIZES, **FAMILIES[family], pad_token_id=0)
    from transformers import AutoModel

    AutoModel.from_config(config).save_pretrained(tmp_path / "model")
    heads = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        model = load(tmp_path / "model", tmp_path / f"cache{seed}")
        assert torch.equal(torch.get_rng_state(), before)
        assert set(missing_head(model)) == HEADS[family]
        heads.append(torch.cat([model.get_parameter(name).flatten() for name in sorted(HEADS[family])]))
    assert torch.equal(*heads)


def test_a_head_with_another_number_of_labels_is_new(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "bert", "classification")
    model = load(folder, tmp_path / "cache", num_labels=5)
    assert set(missing_head(model)) == HEADS["bert"]
    assert model(**BATCH).logits.shape == (2, 5)
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert torch.equal(model.bert(**BATCH).pooler_output, plain.bert(**BATCH).pooler_output)


def test_a_missing_pooler_is_drawn_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    BertModel(BertConfig(**SIZES), add_pooling_layer=False).save_pretrained(tmp_path / "model")
    with caplog.at_level(logging.WARNING, logger="fedray"):
        model = load(tmp_path / "model", tmp_path / "cache")
    assert "bert.pooler.dense.weight" in caplog.text
    assert not set(missing_head(model)) & {"bert.pooler.dense.weight"}


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "bert", "classification")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96, "vocab_size": 80}))
    with pytest.raises(ConfigError, match="another shape than its configuration says: .*model.config"):
        load(folder, tmp_path / "cache")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_random_weights_follow_the_seed(tmp_path: Path, family: str) -> None:
    model = ModelConfig(path="random", tokenizer="bytes", config={"model_type": family, **SIZES, **FAMILIES[family]})
    arch = architecture(model, "classification", 3, 50, 0)
    torch.manual_seed(0)
    first = load_backbone(model, arch, "classification", 1, "cpu", tmp_path / "a")
    torch.manual_seed(9)
    again = load_backbone(model, arch, "classification", 1, "cpu", tmp_path / "b")
    other = load_backbone(model, arch, "classification", 2, "cpu", tmp_path / "b")
    assert set(missing_head(first)) == HEADS[family]
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
    embeddings = [m.get_input_embeddings().weight for m in (first, other)]
    assert not torch.equal(*embeddings)
    assert first(**BATCH).logits.isfinite().all()


def test_every_dropout_is_off() -> None:
    model = random_bert(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.2, classifier_dropout=0.3)
    arch = architecture(model, "classification", 2, None, None)
    assert {arch.hidden_dropout_prob, arch.attention_probs_dropout_prob, arch.classifier_dropout} == {0.0}
    dropouts = [m.p for m in meta_backbone(arch, "classification").modules() if isinstance(m, nn.Dropout)]
    assert dropouts
    assert set(dropouts) == {0.0}


@pytest.mark.parametrize(
    ("family", "positions"), [("bert", 40), ("roberta", 38), ("gpt2", 40), ("llama", None), ("gpt_neox", None)]
)
def test_learned_positions_limit_what_a_model_reads(family: str, positions: int | None) -> None:
    """RoBERTa counts positions from pad_token_id + 1 on: with padding token 1, two of 40 are never used. Reading one
    token more than the model has positions for fails; RoPE has no limit of this kind."""
    sizes = (
        {"n_positions": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 50} if family == "gpt2" else SIZES
    )
    model = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model(family, **sizes, num_labels=2, pad_token_id=1)
    )
    assert max_positions(model) == positions
    longest = torch.full((1, positions or 60), 5)
    model(input_ids=longest)
    if positions is not None:
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, positions + 1), 5))


def test_tasks() -> None:
    model = random_bert()
    classes = architecture(model, "classification", 7, None, 3)
    assert (classes.num_labels, classes.problem_type, classes.pad_token_id) == (7, "single_label_classification", 3)
    regression = architecture(model, "regression", 7, None, None)
    assert (regression.num_labels, regression.problem_type) == (1, "regression")
    assert meta_backbone(regression, "regression").classifier.out_features == 1
    llama = ModelConfig(path="random", tokenizer="bytes", config={"model_type": "llama", **SIZES})
    causal = meta_backbone(architecture(llama, "causal_lm", 0, None, None), "causal_lm")
    assert causal.get_output_embeddings().out_features == 50
    assert {parameter.device.type for parameter in causal.parameters()} == {"meta"}


def test_the_vocabulary_of_a_random_model_is_the_tokenizers() -> None:
    fields = {name: value for name, value in SIZES.items() if name != "vocab_size"}
    model = ModelConfig(path="random", tokenizer="bytes", config={"model_type": "bert", **fields})
    assert architecture(model, "classification", 2, 259, None).vocab_size == 259
    assert architecture(random_bert(), "classification", 2, 40, None).vocab_size == 50
    with pytest.raises(ConfigError, match="has 259 tokens, but the model 'random' only 50"):
        architecture(random_bert(), "classification", 2, 259, None)


def test_overrides_of_a_stored_configuration(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "llama", "causal_lm")
    arch = architecture(ModelConfig(path=str(folder), config={"rms_norm_eps": 0.5}), "causal_lm", 0, None, None)
    assert arch.rms_norm_eps == 0.5
    with pytest.raises(ConfigError, match=r"model\.config\.rms_norm_epz: llama has no such field.*'rms_norm_eps'"):
        architecture(ModelConfig(path=str(folder), config={"rms_norm_epz": 0.5}), "causal_lm", 0, None, None)
    with pytest.raises(ConfigError, match=r"model\.config\.hidden_size.*int"):
        architecture(ModelConfig(path=str(folder), config={"hidden_size": "x"}), "causal_lm", 0, None, None)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "brt"}, r"no 'brt' \(did you mean 'bert'\?\)"),
        ({"model_type": "bert", "hidden_sise": 3}, r"no such field \(did you mean 'hidden_size'\?\)"),
        ({"model_type": "bert", "hidden_size": "x"}, "expected int"),
    ],
)
def test_mistakes_in_a_random_models_configuration(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        architecture(ModelConfig(path="random", tokenizer="bytes", config=config), "classification", 2, None, None)


def test_sizes_that_do_not_fit_together(tmp_path: Path) -> None:
    model = random_bert(num_attention_heads=3)
    with pytest.raises(ConfigError, match="hidden size"):
        meta_backbone(architecture(model, "classification", 2, None, None), "classification")


def test_models_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        architecture(ModelConfig(path="./nowhere"), "classification", 2, None, None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"model\.path: no configuration could be read"):
        architecture(ModelConfig(path=str(tmp_path / "empty")), "classification", 2, None, None)
    folder = save(tmp_path / "model", "bert", "classification")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model\.path: no weights could be loaded.*local folder"):
        load(folder, tmp_path / "cache")


def test_the_file_holds_tied_weights_once(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "llama", "causal_lm", tie_word_embeddings=True)
    model = load(folder, tmp_path / "cache", "causal_lm")
    tensors: dict[str, Tensor] = load_file(next((tmp_path / "cache").rglob("*.safetensors")))
    assert sum(name in ("lm_head.weight", "model.embed_tokens.weight") for name in tensors) == 1
    stored = sum(t.numel() for name, t in tensors.items() if not name.startswith("buffer:"))
    assert stored == sum(parameter.numel() for parameter in model.parameters())
