from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fedray.adapters.draws import draw_head
from fedray.adapters.heads import LABEL_TEXT_SCALE, head_group, label_text_head
from fedray.adapters.layout import Layout, Slot
from fedray.adapters.lora import attach_lora
from fedray.adapters.reft import attach_reft
from fedray.config import LoraSection, ReftSection
from fedray.errors import ConfigError
from fedray.models.tokenizer import byte_tokenizer

Make = Callable[..., PreTrainedModel]

HEADS = {
    "bert": ["classifier.weight", "classifier.bias"],
    "roberta": [f"classifier.{part}.{kind}" for part in ("dense", "out_proj") for kind in ("weight", "bias")],
    "llama": ["score.weight"],
    "gpt2": ["score.weight"],
    "gpt_neox": ["score.weight"],
    "qwen2": ["score.weight"],
}


def test_heads_of_all_families(make: Make, family: str) -> None:
    adapter = attach_lora(make(family), LoraSection())
    adapter.set_trainable("head")
    assert [slot.module for slot in adapter.layout("head").slots] == HEADS[family]
    assert {p.requires_grad for p in adapter.model.base_model.parameters()} == {False}
    assert adapter.num_trainable() == adapter.layout("head").size
    stored = np.concatenate([adapter.model.get_parameter(name).detach().numpy().ravel() for name in HEADS[family]])
    assert np.array_equal(adapter.read("head"), stored)


def test_every_adapter_brings_the_head(make: Make) -> None:
    """And its interventions, which live inside the base model, are not taken for a head."""
    assert attach_lora(make("bert"), LoraSection()).names == ("lora", "head")
    adapter = attach_reft(make("bert"), ReftSection())
    assert adapter.names == ("reft", "head")
    group = head_group(adapter.model)
    assert group is not None
    assert group.layout == adapter.layout("head")


def test_language_models_have_no_head(make: Make) -> None:
    for family in ("llama", "gpt_neox"):
        assert attach_lora(make(family, causal=True), LoraSection()).names == ("lora",)


def test_only_what_the_checkpoint_lacks_is_drawn() -> None:
    """Matrices N(0, 0.02²), biases 0, weights of normalisations 1; each by its own key."""
    shapes = {"dense.weight": (40, 50), "dense.bias": (40,), "norm.weight": (40,), "out.weight": (40, 50)}
    layout = Layout(tuple(Slot(name, "tensor", shape) for name, shape in shapes.items()))
    kept = np.full(layout.size, 7, np.float32)
    drawn = draw_head(layout, kept, {"dense.weight", "dense.bias", "norm.weight"}, seed=1, std=0.02)
    views = layout.views(drawn)
    assert set(views["out.weight.tensor"].ravel()) == {7.0}
    assert set(views["dense.bias.tensor"]) == {0.0}
    assert set(views["norm.weight.tensor"]) == {1.0}
    # 2000 draws: the relative standard error of their deviation is 1/√4000 = 1.6 %
    assert views["dense.weight.tensor"].std() == pytest.approx(0.02, rel=0.08)
    alone = draw_head(Layout(layout.slots[:1]), kept[:2000], {"dense.weight"}, seed=1, std=0.02)
    assert np.array_equal(alone, views["dense.weight.tensor"].ravel())
    assert not np.array_equal(draw_head(layout, kept, {"dense.weight"}, seed=2, std=0.02)[:2000], alone)
    assert set(kept) == {7.0}


def features(model: PreTrainedModel, family: str, texts: list[str]) -> Tensor:
    """What the last layer reads, one text at a time (so nothing is padded), through the model's own parts."""
    rows = []
    for text in texts:
        hidden = model.base_model(**byte_tokenizer()(text, return_tensors="pt"))
        if family == "bert":
            rows.append(hidden.pooler_output[0])
        elif family == "roberta":
            rows.append(torch.tanh(model.classifier.dense(hidden.last_hidden_state[0, 0])))
        else:
            rows.append(hidden.last_hidden_state[0, -1])
    return torch.stack(rows).detach()


@pytest.mark.parametrize("side", ["left", "right"])
def test_frozen_label_text(make: Make, family: str, side: str) -> None:
    names, texts = ["card_arrival", "lost-or-stolen card", "pin"], ["card arrival", "lost or stolen card", "pin"]
    model = make(family, vocab_size=260, pad_token_id=256 if family != "roberta" else 1, max_position_embeddings=300)
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = side
    if family == "roberta":  # positions start behind the padding token's id
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(1)
    model.train()
    vector = label_text_head(model, tokenizer, names)
    assert model.training
    head = head_group(model.eval())
    assert head is not None
    head.load(vector)
    f = features(model, family, texts)
    centred = f - f.mean(0)
    norms = centred.norm(dim=1, keepdim=True)
    last = head.layout.views(vector)[[n for n in HEADS[family] if n.endswith("weight")][-1] + ".tensor"]
    torch.testing.assert_close(
        torch.from_numpy(last), LABEL_TEXT_SCALE * centred / norms / norms.mean(), atol=1e-4, rtol=1e-3
    )
    logits = centred @ torch.from_numpy(last).T
    assert logits.argmax(1).tolist() == [0, 1, 2]
    assert float(logits.diagonal().mean()) == pytest.approx(LABEL_TEXT_SCALE, rel=1e-3)
    biases = [view for slot, view in head.layout.items(vector) if slot.module.endswith("bias")]
    assert len(biases) == sum(name.endswith("bias") for name in HEADS[family])
    assert not biases or not biases[-1].any()


def test_label_texts_that_cannot_make_a_head(make: Make) -> None:
    model = make("bert", vocab_size=260)
    with pytest.raises(ConfigError, match="has 3 for 2 labels"):
        label_text_head(model, byte_tokenizer(), ["a", "b"])
    with pytest.raises(ConfigError, match="cannot tell the labels apart"):
        label_text_head(model, byte_tokenizer(), ["a", "a", "a"])
    with pytest.raises(ConfigError, match="no linear layer"):
        label_text_head(make("llama", causal=True), byte_tokenizer(), ["a", "b"])
