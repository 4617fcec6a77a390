"""Sentence encoders are read as they were trained, and architectures without a classifier have one."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from fedray.adapters.heads import head_group, head_modules, label_text_head
from fedray.adapters.lora import attach_lora
from fedray.adapters.reft import attach_reft
from fedray.config import LoraSection, ModelConfig, Pooling, ReftSection, TierConfig
from fedray.errors import ConfigError
from fedray.evaluation.losses import score
from fedray.models.architecture import architecture
from fedray.models.attention import NAME
from fedray.models.backbone import load_backbone, meta_backbone, missing_head
from fedray.models.pooling import pool
from fedray.models.tokenizer import byte_tokenizer
from fedray.training.base_model import as_held
from tests.models.test_checkpoints import BATCH, SIZES, drawn

HIDDEN = 16


def old_folder(folder: Path, mode: str, normalised: bool) -> None:
    """As sentence-transformers wrote a folder until its version 5."""
    kinds = ["cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken"]
    described = {f"pooling_mode_{kind}": kind == mode for kind in kinds} | {"word_embedding_dimension": HIDDEN}
    write(folder, described, "sentence_transformers.models.", normalised)


def new_folder(folder: Path, mode: Any, normalised: bool) -> None:
    described = {"embedding_dimension": HIDDEN, "pooling_mode": mode, "include_prompt": True}
    write(folder, described, "sentence_transformers.sentence_transformer.modules.pooling.", normalised)


def write(folder: Path, described: dict[str, Any], package: str, normalised: bool, *others: str) -> None:
    kinds = ["Transformer", "Pooling", *others, *(["Normalize"] if normalised else [])]
    paths = ["", *(f"{i}_{kind}" for i, kind in enumerate(kinds) if i)]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": package + kind}
        for i, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(described))


def load(folder: Path, cache: Path, **fields: Any) -> Any:
    section = ModelConfig(path=str(folder), **fields)
    arch = architecture(section, "classification", 3, None, 0, ("a", "b", "c"))
    return load_backbone(section, arch, "classification", seed=0, device="cpu", cache_dir=cache)


def random_model(family: str, pooling: Pooling | None, device: str = "meta", **fields: Any) -> Any:
    """A model with random weights, without weights of a file."""
    known = {*AutoConfig.for_model(family).to_dict(), *AutoConfig.for_model(family).attribute_map}
    sizes = {name: value for name, value in SIZES.items() if name in known}
    section = ModelConfig(
        path="random", tokenizer="bytes", config={"model_type": family, **sizes, **fields}, pooling=pooling
    )
    arch = architecture(section, "classification", 3, None, 0)
    return arch if device == "arch" else meta_backbone(arch, "classification")


def vectors(states: Tensor, mode: Pooling) -> Tensor:
    """Of the tests' batch, whose second text has three tokens: one text after the other."""
    texts = [states[0, :5], states[1, :3]]
    each = {"mean": lambda text: text.mean(0), "cls": lambda text: text[0], "last": lambda text: text[-1]}[mode]
    return torch.stack([each(text) for text in texts])


def logits(model: Any, batch: dict[str, Tensor] = BATCH) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**batch).logits
    return found


@given(st.data(), st.sampled_from(["mean", "cls", "last"]), st.sampled_from(["left", "right", "none"]))
def test_padding_is_not_pooled(data: st.DataObject, pooling: Pooling, side: str) -> None:
    """Each text by itself, without padding, gives the same vector."""
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    width = max(lengths) if side == "none" else max(lengths) + data.draw(st.integers(0, 2))
    lengths = [width] * len(lengths) if side == "none" else lengths
    states = torch.randn(len(lengths), width, 3, generator=torch.Generator().manual_seed(sum(lengths)))
    place = torch.arange(width)
    ends = torch.tensor(lengths)[:, None]
    mask = (place < ends if side != "left" else place >= width - ends).long()
    alone = [
        pool(states[i][mask[i].bool()][None], torch.ones(1, n, dtype=torch.long), pooling)
        for i, n in enumerate(lengths)
    ]
    assert torch.allclose(pool(states, mask, pooling), torch.cat(alone), atol=1e-6)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(
    ("form", "mode", "pooling"),
    [
        (old_folder, "mean_tokens", "mean"),
        (old_folder, "cls_token", "cls"),
        (old_folder, "lasttoken", "last"),
        (new_folder, "mean", "mean"),
        (new_folder, ["cls"], "cls"),
        (new_folder, "lasttoken", "last"),
    ],
)
def test_a_sentence_encoder_is_read_as_its_folder_says(
    tmp_path: Path, form: Any, mode: Any, pooling: Pooling, normalised: bool
) -> None:
    """Normalised vectors have length √d = 4. BERT's pooler is not used, not counted and not reported as missing."""
    folder = tmp_path / "model"
    drawn("bert", "classification").bert.save_pretrained(folder)
    form(folder, mode, normalised)
    model = load(folder, tmp_path / "cache")
    features = vectors(AutoModel.from_pretrained(folder).eval()(**BATCH).last_hidden_state, pooling)
    if normalised:
        features = 4 * features / features.norm(dim=1, keepdim=True)
    assert torch.allclose(logits(model), model.classifier(features), atol=1e-5)
    assert set(missing_head(model)) == {"classifier.weight", "classifier.bias"}
    assert not any("pooler" in name for name, _ in model.named_parameters())


def test_the_configuration_overrides_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    drawn("bert", "classification").bert.save_pretrained(folder)
    new_folder(folder, "mean", True)
    states = AutoModel.from_pretrained(folder).eval()(**BATCH).last_hidden_state
    model = load(folder, tmp_path / "cache", pooling="cls")
    assert torch.allclose(logits(model), model.classifier(vectors(states, "cls")), atol=1e-5)
    own = load(folder, tmp_path / "cache", pooling="head")
    with torch.no_grad():
        pooled = AutoModel.from_pretrained(folder).eval()(**BATCH).pooler_output
    assert torch.allclose(logits(own), own.classifier(pooled), atol=1e-6)


@pytest.mark.parametrize("mode", ["max", "weightedmean", ["mean", "max"]])
def test_other_ways_of_pooling_are_refused(tmp_path: Path, mode: Any) -> None:
    folder = tmp_path / "model"
    drawn("bert", "classification").bert.save_pretrained(folder)
    new_folder(folder, mode, False)
    with pytest.raises(ConfigError, match=r"model\.pooling: .* pools its tokens by .*(max|weightedmean)"):
        load(folder, tmp_path / "cache")
    assert load(folder, tmp_path / "cache", pooling="mean").classifier.out_features == 3


def test_a_projection_behind_the_pooling_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "model"
    drawn("bert", "classification").bert.save_pretrained(folder)
    write(folder, {"pooling_mode": "mean"}, "sentence_transformers.models.", True, "Dense")
    with caplog.at_level(logging.WARNING, logger="fedray"):
        load(folder, tmp_path / "cache")
    assert "further layers are left out: Dense" in caplog.text


WITHOUT_CLASSIFIER: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 4},
    "cohere": {},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granite": {"num_key_value_heads": 1},
    "xglm": {"d_model": 16, "num_layers": 2, "attention_heads": 2, "ffn_dim": 24},
    "bert-generation": {},
}


@pytest.mark.parametrize("saved", ["language model", "base"])
@pytest.mark.parametrize("family", sorted(WITHOUT_CLASSIFIER))
def test_architectures_without_a_classifier(tmp_path: Path, family: str, saved: str) -> None:
    """A decoder's last token has read all others; of an encoder the mean counts."""
    known = {*AutoConfig.for_model(family).to_dict(), *AutoConfig.for_model(family).attribute_map}
    sizes = {name: value for name, value in SIZES.items() if name in known}
    config = AutoConfig.for_model(family, **{**sizes, **WITHOUT_CLASSIFIER[family]})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        auto = AutoModelForCausalLM if saved == "language model" else AutoModel
        auto.from_config(config).save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model", tmp_path / "cache")
    with torch.no_grad():
        states = AutoModel.from_pretrained(tmp_path / "model").eval()(**BATCH)[0]
    pooling: Pooling = "mean" if family == "bert-generation" else "last"
    assert torch.allclose(logits(model), model.classifier(vectors(states, pooling)), atol=1e-6)
    assert set(missing_head(model)) == {"classifier.weight", "classifier.bias"}
    with pytest.raises(ConfigError, match=f"no classifier for {family}; choose mean, cls or last"):
        load(tmp_path / "model", tmp_path / "cache", pooling="head")


def test_an_encoder_decoder_without_a_classifier(tmp_path: Path) -> None:
    """Its decoder reads the text again, shifted by the start token, as BART's own classifier does."""
    small = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 40, "pad_token_id": 0}
    config = AutoConfig.for_model("pegasus", **small, **heads, max_position_embeddings=32, decoder_start_token_id=0)
    AutoModel.from_config(config).save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model", tmp_path / "cache")
    shifted = torch.tensor([[0, 5, 9, 7, 8], [0, 6, 4, 2, 0]])
    with torch.no_grad():
        states = AutoModel.from_pretrained(tmp_path / "model").eval()(**BATCH, decoder_input_ids=shifted)[0]
    assert torch.allclose(logits(model), model.classifier(vectors(states, "last")), atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_left_and_right_padding_agree(family: str, pooling: Pooling) -> None:
    """Of families whose positions are relative."""
    arch = random_model(family, pooling, "arch")
    section = ModelConfig(path="random", tokenizer="bytes", config={"model_type": family})
    model = load_backbone_of(arch, section)
    left = {
        "input_ids": torch.tensor([[5, 9, 7, 8, 2], [0, 0, 6, 4, 2]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]),
    }
    assert torch.allclose(logits(model), logits(model, left), atol=1e-5)
    alone = logits(model, {"input_ids": torch.tensor([[6, 4, 2]])})
    assert torch.allclose(logits(model)[1:], alone, atol=1e-5)


def load_backbone_of(arch: Any, section: ModelConfig, dtype: torch.dtype = torch.float32) -> Any:
    from fedray.models.build import build

    arch.dtype = dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = build(arch, "classification")
    return model.requires_grad_(False).eval()


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_it_trains_as_any_other_model(family: str) -> None:
    """In bfloat16 on a CPU: the head is float32, attention is switched, and activations are computed again."""
    arch = random_model(family, "mean", "arch")
    section = ModelConfig(path="random", tokenizer="bytes", config={"model_type": family})
    batch = {**BATCH, "labels": torch.tensor([0, 2])}
    gradients = []
    for checkpointing in (False, True):
        model = as_held(
            load_backbone_of(arch, section, torch.bfloat16),
            TierConfig(share=1.0, activation_checkpointing=checkpointing),
            "cpu",
        )
        assert model.config._attn_implementation == NAME
        assert {name: module.weight.dtype for name, module in head_modules(model).items()} == {
            "classifier": torch.float32
        }
        adapter = attach_lora(model, LoraSection(rank=2), seed=1)
        rng = np.random.default_rng(0)
        adapter.load("lora", rng.normal(0, 0.1, adapter.layout("lora").size).astype(np.float32))
        score(model.train(), batch, "classification").losses.mean().backward()
        found = [parameter.grad for group in adapter.trainable_groups() for parameter in group.parameters]
        assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in found)
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
    assert torch.allclose(*gradients, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "mamba", "olmo2"])
def test_adapters_attach(family: str) -> None:
    fields = {"num_key_value_heads": 1} if family == "olmo2" else {}
    head = [
        slot.name for slot in attach_reft(random_model(family, "mean", **fields), ReftSection()).layout("head").slots
    ]
    assert head == ["classifier.weight.tensor", "classifier.bias.tensor"]
    if family != "mamba":
        targets = attach_lora(random_model(family, "mean", **fields), LoraSection()).targets
        assert len(targets) == 4


def test_label_texts_are_read_in_the_same_way() -> None:
    model = load_backbone_of(
        random_model("bert", "mean", "arch", vocab_size=259, initializer_range=0.5), random_section("bert")
    )
    vector = label_text_head(model, byte_tokenizer(), ("one", "two", "three"))
    group = head_group(model)
    assert group is not None
    rows = torch.from_numpy(group.layout.views(vector)["classifier.weight.tensor"])
    texts = [byte_tokenizer()(text, return_tensors="pt") for text in ("one", "two", "three")]
    with torch.no_grad():
        features = torch.cat([model.bert(**text)[0].mean(1) for text in texts])
    centred = features - features.mean(0)
    assert torch.allclose(nn.functional.normalize(centred), nn.functional.normalize(rows), atol=1e-5)


def random_section(family: str) -> ModelConfig:
    return ModelConfig(path="random", tokenizer="bytes", config={"model_type": family})


def test_a_trained_head_of_the_family_does_not_fit_another_pooling(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """BERT's classifier has the same name and the same shape here, and was trained on the pooler's output."""
    folder = tmp_path / "model"
    drawn(
        "bert", "classification", id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2}
    ).save_pretrained(folder)
    with caplog.at_level(logging.WARNING, logger="fedray"):
        model = load(folder, tmp_path / "cache", pooling="mean")
    assert set(missing_head(model)) == {"classifier.weight", "classifier.bias"}
    assert "trained on another vector of a text than model.pooling mean makes; a new head is drawn" in caplog.text
    expected = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert torch.equal(logits(load(folder, tmp_path / "cache")), logits(expected))


def test_the_scale_of_a_normalised_vector() -> None:
    """√d: its entries have mean square 1, whatever the model's own scale is."""
    arch = random_model("bert", "mean", "arch")
    arch.fedray = {**arch.fedray, "normalised": True}
    model = load_backbone_of(arch, random_section("bert"))
    seen: list[Tensor] = []
    model.classifier.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits(model)
    assert torch.allclose(seen[0].norm(dim=1), torch.full((2,), math.sqrt(HIDDEN)))
