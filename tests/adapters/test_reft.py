"""Interventions of LoReFT and its kinds: which tokens they edit, how, and in which forward passes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedray.adapters.adapter import Adapter
from fedray.adapters.draws import draw_reft
from fedray.adapters.dropout import dropout_mask
from fedray.adapters.reft import attach_reft, find_blocks
from fedray.config import ReftSection
from fedray.errors import ConfigError
from fedray.models.labels import labelled

Make = Callable[..., PreTrainedModel]
Batch = dict[str, Tensor]
Kinds = pytest.mark.parametrize("kind", ["loreft", "noreft", "direft", "nodireft"])


def section(**fields: Any) -> ReftSection:
    return ReftSection(rank=3, **fields)


def fill(adapter: Adapter, seed: int = 0) -> None:
    vector = draw_reft(adapter.layout("reft"), seed)
    adapter.load("reft", (vector * 2).astype(np.float32))  # R comes back to the manifold, the rest doubles


def tap(model: nn.Module, path: str) -> tuple[list[Tensor], Callable[[], list[Tensor]]]:
    """Record a block's output before the interventions' hook; the returned function starts recording it after."""
    before: list[Tensor] = []
    after: list[Tensor] = []

    def keep(into: list[Tensor]) -> Callable[..., None]:
        return lambda _, __, output: into.append(output[0] if isinstance(output, tuple) else output)

    block = model.get_submodule(path)
    block.register_forward_hook(keep(before))

    def start() -> list[Tensor]:
        block.register_forward_hook(keep(after))
        return after

    return before, start


def run(model: PreTrainedModel, fields: dict[str, Any], **inputs: Tensor) -> tuple[Adapter, Tensor, Tensor, str]:
    """Attach, fill, run; return the adapter and the last block's output without and with the intervention."""
    path = list(find_blocks(model))[-1]
    before, start = tap(model, path)
    adapter = attach_reft(model, section(**fields))
    fill(adapter)
    after = start()
    adapter.model(**inputs)
    return adapter, before[0], after[0], path


def edited(adapter: Adapter, name: str, kind: str, h: Tensor) -> Tensor:
    """The papers' formulas for one token's h [d], from the flat vector."""
    views = {key: torch.from_numpy(view) for key, view in adapter.layout("reft").views(adapter.read("reft")).items()}
    w, b = views[f"{name}.W"], views[f"{name}.b"]
    projection = views[f"{name}.R"] if kind in ("loreft", "direft") else views[f"{name}.P"]
    source = w @ h + b
    return h + projection.T @ (source - projection @ h if kind in ("loreft", "noreft") else source)


def check(adapter: Adapter, path: str, kind: str, before: Tensor, after: Tensor, where: list[dict[int, str]]) -> None:
    """where: per example, token -> name of the intervention that edits it; all other tokens must be untouched."""
    for example, tokens in enumerate(where):
        for token in range(before.shape[1]):
            h, got = before[example, token].float(), after[example, token].float()
            if token in tokens:
                expected = edited(adapter, f"{path}.{tokens[token]}", kind, h)
                assert (expected - h).abs().max() > 1e-3
                torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
            else:
                assert torch.equal(got, h), (example, token)


RIGHT = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0]])
LEFT = RIGHT.flip(1)
TOKENS = torch.arange(3, 31).reshape(4, 7)


def test_first_and_last_tokens(make: Make, family: str) -> None:
    inputs = {"input_ids": TOKENS * RIGHT, "attention_mask": RIGHT}
    adapter, before, after, path = run(make(family), {}, **inputs)
    where = [{0: "prefix", 4: "suffix"}, {0: "prefix", 6: "suffix"}, {0: "prefix"}, {0: "prefix", 2: "suffix"}]
    check(adapter, path, "loreft", before, after, where)


@Kinds
def test_formulas(make: Make, kind: str) -> None:
    inputs = {"input_ids": TOKENS * RIGHT, "attention_mask": RIGHT}
    adapter, before, after, path = run(make("bert"), {"kind": kind}, **inputs)
    where = [{0: "prefix", 4: "suffix"}, {0: "prefix", 6: "suffix"}, {0: "prefix"}, {0: "prefix", 2: "suffix"}]
    check(adapter, path, kind, before, after, where)


def test_left_padding_and_short_examples(make: Make) -> None:
    """f2+l2 with 5, 7, 1 and 3 tokens: in the last, the prefix has two and the suffix what is left."""
    inputs = {"input_ids": TOKENS * LEFT, "attention_mask": LEFT}
    adapter, before, after, path = run(make("llama"), {"positions": "f2+l2"}, **inputs)
    where = [
        {2: "prefix", 3: "prefix", 5: "suffix", 6: "suffix"},
        {0: "prefix", 1: "prefix", 5: "suffix", 6: "suffix"},
        {6: "prefix"},
        {4: "prefix", 5: "prefix", 6: "suffix"},
    ]
    check(adapter, path, "loreft", before, after, where)


def test_halves_of_short_examples(make: Make) -> None:
    """f2+l2 with 5, 7, 1 and 3 tokens: of one token each half is empty, of three tokens it is one."""
    inputs = {"input_ids": TOKENS * LEFT, "attention_mask": LEFT}
    fields = {"positions": "f2+l2", "short_prompts": "halves"}
    adapter, before, after, path = run(make("llama"), fields, **inputs)
    where = [
        {2: "prefix", 3: "prefix", 5: "suffix", 6: "suffix"},
        {0: "prefix", 1: "prefix", 5: "suffix", 6: "suffix"},
        {},
        {4: "prefix", 6: "suffix"},
    ]
    check(adapter, path, "loreft", before, after, where)


@pytest.mark.parametrize(
    ("positions", "tied", "where"),
    [
        ("f2", False, [{0: "prefix", 1: "prefix"}] * 2),
        ("l2", False, [{3: "suffix", 4: "suffix"}, {5: "suffix", 6: "suffix"}]),
        ("f1+l1", True, [{0: "tied", 4: "tied"}, {0: "tied", 6: "tied"}]),
        ("all", False, [dict.fromkeys(range(5), "tied"), dict.fromkeys(range(7), "tied")]),
        ("f9", False, [dict.fromkeys(range(5), "prefix"), dict.fromkeys(range(7), "prefix")]),
    ],
)
def test_positions(make: Make, positions: str, tied: bool, where: list[dict[int, str]]) -> None:
    mask = RIGHT[:2]
    fields = {"positions": positions, "tie_positions": tied}
    adapter, before, after, path = run(make("gpt_neox"), fields, input_ids=TOKENS[:2] * mask, attention_mask=mask)
    check(adapter, path, "loreft", before, after, where)


def test_without_a_mask_every_token_counts(make: Make) -> None:
    adapter, before, after, path = run(make("bert"), {}, input_ids=TOKENS[:1])
    check(adapter, path, "loreft", before, after, [{0: "prefix", 6: "suffix"}])


@pytest.mark.parametrize("given", ["to the model", "around it"])
def test_positions_are_counted_over_the_prompt(make: Make, given: str) -> None:
    """Prompts of 3 tokens (left padding of 2), of 4, and none at all: the last falls back to all its tokens."""
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, :2] = 0
    labels = TOKENS[:3].clone()
    labels[0, :5] = -100
    labels[1, :4] = -100
    model = make("llama", causal=True)
    inputs = {"input_ids": TOKENS[:3], "attention_mask": mask}
    if given == "to the model":
        adapter, before, after, path = run(model, {}, **inputs, labels=labels)
    else:
        with labelled(labels):
            adapter, before, after, path = run(model, {}, **inputs)
    where = [{2: "prefix", 4: "suffix"}, {0: "prefix", 3: "suffix"}, {0: "prefix", 6: "suffix"}]
    check(adapter, path, "loreft", before, after, where)


def test_class_labels_are_no_prompt(make: Make) -> None:
    inputs = {"input_ids": TOKENS * RIGHT, "attention_mask": RIGHT, "labels": torch.tensor([0, 1, 2, 0])}
    adapter, before, after, path = run(make("bert"), {}, **inputs)
    assert not torch.equal(before[:, 0], after[:, 0])
    check(adapter, path, "loreft", before[:1], after[:1], [{0: "prefix", 4: "suffix"}])


@pytest.mark.parametrize("positions", ["f1+l1", "all"])
def test_generation_edits_the_prompt_and_for_all_every_token(make: Make, positions: str) -> None:
    """With a key-value cache each decoding step is a forward pass of one token, of which f1+l1 must edit none."""
    model = make("llama", causal=True)
    path = list(find_blocks(model))[-1]
    before, start = tap(model, path)
    adapter = attach_reft(model, section(positions=positions))
    fill(adapter)
    after = start()
    mask = LEFT[[0, 1]]
    model.generate(
        input_ids=TOKENS[:2] * mask, attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=None
    )
    assert [h.shape[1] for h in before] == [7, 1, 1, 1]
    first = {0: {2: "prefix", 6: "suffix"}, 1: {0: "prefix", 6: "suffix"}}
    if positions == "all":
        first = {0: dict.fromkeys(range(2, 7), "tied"), 1: dict.fromkeys(range(7), "tied")}
    check(adapter, path, "loreft", before[0], after[0], list(first.values()))
    step = [{0: "tied"}] * 2 if positions == "all" else [{}] * 2
    for h, got in zip(before[1:], after[1:], strict=True):
        check(adapter, path, "loreft", h, got, step)


def test_only_chosen_layers_are_edited(make: Make) -> None:
    model = make("bert", num_hidden_layers=3)
    blocks = list(find_blocks(model))
    adapter = attach_reft(model, section(layers=(1,)))
    assert {slot.module for slot in adapter.layout("reft").slots} == {f"{blocks[1]}.prefix", f"{blocks[1]}.suffix"}
    with pytest.raises(ConfigError, match="blocks 0 to 2"):
        attach_reft(make("bert", num_hidden_layers=3), section(layers=(1, 3)))


def test_only_the_adapter_has_gradients(make: Make, family: str, batch: Batch) -> None:
    """Also: no d × d tensor anywhere, the parameters are exactly 2·(2·r·d + r) per block."""
    model = make(family)
    before = torch.get_rng_state()
    adapter = attach_reft(model, section())
    assert torch.equal(torch.get_rng_state(), before)
    assert adapter.layout("reft").size == 2 * 2 * (2 * 3 * 16 + 3)
    own = adapter.model.base_model.reft
    assert sum(t.numel() for t in (*own.parameters(), *own.buffers())) == adapter.layout("reft").size
    adapter.model(**batch).logits.square().sum().backward()
    trained = {id(p) for group in adapter.trainable_groups() for p in group.parameters}
    for name, parameter in adapter.model.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in trained), name
        # The head reads one token of the last block, so the other end's intervention there is without effect.
        assert parameter.grad is None or ".reft.1_" in name or parameter.grad.abs().max() > 0, name


def test_a_bfloat16_base_has_float32_interventions(make: Make, family: str, batch: Batch) -> None:
    model = make(family).to(torch.bfloat16)
    adapter, before, after, path = run(model, {}, **batch)
    assert before.dtype == after.dtype == torch.bfloat16
    expected = edited(adapter, f"{path}.prefix", "loreft", before[1, 0].float())
    torch.testing.assert_close(after[1, 0], expected.to(torch.bfloat16))
    adapter.model(**batch).logits.float().square().sum().backward()
    reft = [p for group in adapter.trainable_groups() if group.name == "reft" for p in group.parameters]
    assert {p.grad.dtype for p in reft} == {torch.float32}


def test_dropout_is_keyed(make: Make) -> None:
    """pyreft drops elements of the edited representation; the mask is over the edited tokens, [examples, d]."""
    model = make("bert")
    path = list(find_blocks(model))[-1]
    before, start = tap(model, path)
    adapter = attach_reft(model, section(positions="f1", dropout=0.5))
    fill(adapter)
    after = start()
    adapter.set_dropout_key(9)
    adapter.model.train()
    adapter.model(input_ids=TOKENS)
    mask = dropout_mask(9, f"{path}.prefix", (4, 16), 0.5, torch.device("cpu"))
    expected = torch.stack([edited(adapter, f"{path}.prefix", "loreft", h) for h in before[0][:, 0]]) * mask / 0.5
    torch.testing.assert_close(after[0][:, 0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_edits_again(make: Make, batch: Batch, reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        adapter = attach_reft(make("llama"), section(dropout=0.2))
        fill(adapter)
        if checkpointing:
            adapter.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            adapter.model.enable_input_require_grads()
        adapter.model.train()
        adapter.model(**batch).logits.square().sum().backward()
        gradients.append([p.grad for g in adapter.trainable_groups() for p in g.parameters])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, atol=1e-6, rtol=1e-5)


def test_positional_arguments_and_tuples(make: Make) -> None:
    """A model may be called with positional arguments."""
    named, positional = (attach_reft(make("bert"), section()) for _ in range(2))
    expected = named.model(input_ids=TOKENS * RIGHT, attention_mask=RIGHT).logits
    assert torch.equal(positional.model(TOKENS * RIGHT, RIGHT).logits, expected)


def test_impossible_sections(make: Make) -> None:
    with pytest.raises(ConfigError, match="hidden size 16"):
        attach_reft(make("bert"), ReftSection(rank=17))
    with pytest.raises(ConfigError, match="no token"):
        attach_reft(make("bert"), ReftSection(positions="f0+l0"))
    model = make("bert")
    attach_reft(model, section())
    with pytest.raises(ValueError, match="already has interventions"):
        attach_reft(model, section())
