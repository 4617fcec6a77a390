from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from fedray.adapters.adapter import Adapter
from fedray.adapters.draws import draw_lora, draw_mixer
from fedray.adapters.dropout import dropout_mask
from fedray.adapters.layout import Layout, Slot
from fedray.adapters.lora import attach_lora
from fedray.config import LoraSection
from fedray.errors import ConfigError

Make = Callable[..., PreTrainedModel]
Batch = dict[str, Tensor]

SECTION = LoraSection(rank=3, alpha=6.0)  # s = 2
SCALE = 2.0
TARGETS = {
    "bert": ("query", "value"),
    "roberta": ("query", "value"),
    "llama": ("q_proj", "v_proj"),
    "gpt_neox": ("query_key_value",),
    "gpt2": ("c_attn",),
    "qwen2": ("q_proj", "v_proj"),
}


def fill(adapter: Adapter, seed: int = 0) -> None:
    """Give every group but the head random values, so that no branch is trivially zero."""
    rng = np.random.default_rng(seed)
    for name in adapter.names:
        if name != "head":
            adapter.load(name, rng.normal(0, 0.3, adapter.layout(name).size).astype(np.float32))


def tensors(adapter: Adapter, group: str) -> dict[str, Tensor]:
    views = adapter.layout(group).views(adapter.read(group))
    return {name: torch.from_numpy(np.array(view)) for name, view in views.items()}


def watch(adapter: Adapter, path: str) -> list[tuple[Tensor, Tensor]]:
    """Collect (input, output) of a target layer."""
    seen: list[tuple[Tensor, Tensor]] = []
    adapter.targets[path].register_forward_hook(
        lambda _, args, output: seen.append((args[0].detach(), output.detach()))
    )
    return seen


def test_attaching_changes_nothing_until_b_is_trained(make: Make, family: str, batch: Batch) -> None:
    expected = make(family)(**batch).logits
    before = torch.get_rng_state()
    adapter = attach_lora(make(family), SECTION, rest_rank=4, mixer="adaptive")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(adapter.model(**batch).logits, expected)
    assert np.abs(adapter.read("lora")).max() > 0


def test_lora_is_the_merged_weight(make: Make, family: str, batch: Batch) -> None:
    """y = (W0 + s B A) x, computed by a model without any adapter whose weights were changed by hand."""
    adapter = attach_lora(make(family), SECTION)
    fill(adapter)
    merged, parts = make(family), tensors(adapter, "lora")
    for path in adapter.targets:
        weight = merged.get_submodule(path).weight
        delta = SCALE * parts[f"{path}.B"] @ parts[f"{path}.A"]
        weight.data += delta.T if family == "gpt2" else delta  # GPT-2 stores its weights transposed
    expected = merged(**batch).logits
    assert (expected - make(family)(**batch).logits).abs().max() > 0.01
    torch.testing.assert_close(adapter.model(**batch).logits, expected, atol=1e-5, rtol=1e-4)


def test_only_the_adapter_has_gradients(make: Make, family: str, batch: Batch) -> None:
    adapter = attach_lora(make(family), SECTION, rest_rank=4, mixer="adaptive")
    fill(adapter)
    adapter.model(**batch).logits.square().sum().backward()
    trained = {id(p) for group in adapter.trainable_groups() for p in group.parameters}
    assert {group.name for group in adapter.trainable_groups()} == {"lora", "mixer", "head"}
    for name, parameter in adapter.model.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in trained), name
        assert parameter.grad is None or parameter.grad.abs().max() > 0, name


def test_flat_state_round_trips_bit_for_bit(make: Make, family: str) -> None:
    adapter = attach_lora(make(family), SECTION, rest_rank=4, mixer="adaptive")
    assert adapter.names == ("lora", "rest", "mixer", "head")
    rng = np.random.default_rng(3)
    for name in adapter.names:
        vector = rng.normal(size=adapter.layout(name).size).astype(np.float32)
        vector.flags.writeable = False  # as it comes out of Ray's object store
        adapter.load(name, vector)
        assert np.array_equal(adapter.read(name), vector)
        copy = adapter.read(name)
        copy[:] = 0
        assert np.array_equal(adapter.read(name), vector)


@pytest.mark.parametrize("mixer", ["adaptive", 0.3, 1, "none", None])
def test_fedalt_formula(make: Make, family: str, batch: Batch, mixer: str | float | None) -> None:
    """y = W0 x + s α_L B A x + s α_R B_R A_R x per token, from the flat vectors and the layer's own input."""
    adapter = attach_lora(make(family), SECTION, rest_rank=3, mixer=mixer)
    fill(adapter)
    path = list(adapter.targets)[-1]
    seen = watch(adapter, path)
    adapter.model(**batch)
    x, y = seen[0]
    own, rest = tensors(adapter, "lora"), tensors(adapter, "rest")
    base = make(family).get_submodule(path)
    if mixer == "adaptive":
        exponentials = (x @ tensors(adapter, "mixer")[f"{path}.G"].T).exp()
        alpha_rest, alpha_own = (exponentials / exponentials.sum(-1, keepdim=True)).split(1, dim=-1)
        assert alpha_own.std() > 0.01
    else:
        alpha_own, alpha_rest = {0.3: (0.3, 0.7), 1: (1.0, 0.0)}.get(mixer, (1.0, 1.0))
    expected = base(x) + SCALE * alpha_own * (x @ own[f"{path}.A"].T @ own[f"{path}.B"].T)
    expected = expected + SCALE * alpha_rest * (x @ rest[f"{path}.A"].T @ rest[f"{path}.B"].T)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shared", [True, False])
def test_dropout_is_one_draw_for_both_branches_or_the_first_alone(make: Make, batch: Batch, shared: bool) -> None:
    """FedALT: both branches see the same dropped x. FedHFT: the second sees x itself. The mixer always does."""
    section = SECTION.model_copy(update={"dropout": 0.4})
    adapter = attach_lora(make("bert"), section, rest_rank=2, rest_dropout=shared, mixer="adaptive")
    fill(adapter)
    adapter.model.train()
    adapter.set_dropout_key(17)
    path = list(adapter.targets)[-1]
    seen = watch(adapter, path)
    adapter.model(**batch)
    x, y = seen[0]
    dropped = x * dropout_mask(17, path, x.shape, 0.4, x.device) / 0.6
    own, rest = tensors(adapter, "lora"), tensors(adapter, "rest")
    weights = torch.softmax(x @ tensors(adapter, "mixer")[f"{path}.G"].T, -1)
    expected = make("bert").get_submodule(path)(x)
    expected = expected + SCALE * weights[..., 1:] * (dropped @ own[f"{path}.A"].T @ own[f"{path}.B"].T)
    other = dropped if shared else x
    expected = expected + SCALE * weights[..., :1] * (other @ rest[f"{path}.A"].T @ rest[f"{path}.B"].T)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)


def test_the_rest_stays_frozen(make: Make, batch: Batch) -> None:
    """Through optimizer steps with weight decay, and through peft's own switches."""
    adapter = attach_lora(make("bert"), SECTION, rest_rank=3, mixer="adaptive")
    fill(adapter)
    rest, own = adapter.read("rest"), adapter.read("lora")
    for layer in adapter.targets.values():
        layer.set_adapter("default")
        layer.enable_adapters(False)
        layer.enable_adapters(True)
    trained = [p for p in adapter.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        adapter.model(**batch).logits.square().sum().backward()
        optimizer.step()
    assert np.array_equal(adapter.read("rest"), rest)
    assert not np.array_equal(adapter.read("lora"), own)


def test_disabled_adapters_give_the_base_output(make: Make, family: str, batch: Batch) -> None:
    adapter = attach_lora(make(family), SECTION, rest_rank=3, mixer="adaptive")
    fill(adapter)
    expected = make(family)(**batch).logits
    assert not torch.equal(adapter.model(**batch).logits, expected)
    for layer in adapter.targets.values():
        layer.enable_adapters(False)
    assert torch.equal(adapter.model(**batch).logits, expected)


def test_merging_is_refused(make: Make) -> None:
    adapter = attach_lora(make("bert"), SECTION)
    with pytest.raises(NotImplementedError, match="shared between clients"):
        next(iter(adapter.targets.values())).merge()


@settings(max_examples=15)
@given(
    first=st.sets(st.integers(0, 15), min_size=1, max_size=16),
    second=st.sets(st.integers(0, 15), min_size=1, max_size=16),
)
def test_masked_rows_are_a_lora_whose_other_rows_are_zero(make: Make, first: set[int], second: set[int]) -> None:
    """Same outputs, same gradients of A and of the rows that exist; rows that come later start at zero."""
    generator = torch.Generator().manual_seed(1)
    tokens = {"input_ids": torch.randint(3, 50, (2, 5), generator=generator)}
    masked, dense = attach_lora(make("bert"), SECTION), attach_lora(make("bert"), SECTION)
    fill(masked)
    rows = {path: np.array(sorted(chosen)) for path, chosen in zip(masked.targets, (first, second) * 2, strict=True)}
    zeroed = masked.read("lora")
    for slot, view in masked.layout("lora").items(zeroed):
        if slot.part == "B":
            view[np.setdiff1d(np.arange(16), rows[slot.module])] = 0
    dense.load("lora", zeroed)
    masked.set_rows(rows)
    gradients = []
    for adapter in (masked, dense):
        logits = adapter.model(**tokens).logits
        logits.square().sum().backward()
        gradients.append((logits, {n: p.grad for n, p in adapter.model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(gradients[0][0], gradients[1][0], atol=1e-6, rtol=1e-5)
    for name, gradient in gradients[1][1].items():
        path = name.partition(".lora_")[0]
        expected = gradient[rows[path]] if ".lora_B." in name else gradient
        torch.testing.assert_close(gradients[0][1][name], expected, atol=1e-5, rtol=1e-4)
    kept = sum(3 * 16 + 3 * len(rows[path]) for path in rows)
    assert masked.layout("lora").size == kept == masked.read("lora").size
    masked.set_rows(None)
    assert np.array_equal(masked.read("lora"), zeroed)


def test_masked_rows_keep_what_trains_and_their_order(make: Make) -> None:
    adapter = attach_lora(make("bert"), SECTION)
    adapter.set_trainable("lora.B")
    rows = {path: np.array([1, 4, 9]) for path in adapter.targets}
    adapter.set_rows(rows)
    assert adapter.num_trainable() == 4 * 3 * 3  # four layers, three rows, rank 3
    assert [slot.shape for slot in adapter.layout("lora").slots[:2]] == [(3, 16), (3, 3)]
    adapter.set_rows({path: np.array([4, 5]) for path in adapter.targets})
    assert adapter.num_trainable() == 4 * 2 * 3


@pytest.mark.parametrize(
    ("rows", "message"),
    [([3, 1], "sorted"), ([1, 1], "sorted"), ([-1, 2], "sorted"), ([], "sorted"), ([2, 16], "16 rows")],
)
def test_bad_rows(make: Make, rows: list[int], message: str) -> None:
    adapter = attach_lora(make("bert"), SECTION)
    with pytest.raises(ValueError, match=message):
        adapter.set_rows({path: np.array(rows, dtype=np.int64) for path in adapter.targets})
    with pytest.raises(ValueError, match="targets are"):
        adapter.set_rows({"elsewhere": np.array([0])})


def test_a_bfloat16_base_has_float32_adapters(make: Make, family: str, batch: Batch) -> None:
    adapter = attach_lora(make(family).to(torch.bfloat16), SECTION, rest_rank=2, mixer="adaptive")
    fill(adapter)
    path = list(adapter.targets)[-1]
    seen = watch(adapter, path)
    adapter.model(**batch).logits.float().square().sum().backward()
    x, y = seen[0]
    assert x.dtype == y.dtype == torch.bfloat16
    for group in adapter.trainable_groups():
        if group.name != "head":
            assert {p.dtype for p in group.parameters} == {p.grad.dtype for p in group.parameters} == {torch.float32}
    own, rest, x32 = tensors(adapter, "lora"), tensors(adapter, "rest"), x.float()
    weights = torch.softmax(x32 @ tensors(adapter, "mixer")[f"{path}.G"].T, -1)
    expected = adapter.targets[path].get_base_layer()(x).float()
    expected = expected + SCALE * weights[..., 1:] * (x32 @ own[f"{path}.A"].T @ own[f"{path}.B"].T)
    expected = expected + SCALE * weights[..., :1] * (x32 @ rest[f"{path}.A"].T @ rest[f"{path}.B"].T)
    assert torch.equal(y, expected.to(torch.bfloat16)) or (y - expected).abs().max() < 2**-7 * expected.abs().max()


def test_mixer_mean_is_over_tokens_that_are_not_padding(make: Make, batch: Batch) -> None:
    adapter = attach_lora(make("bert"), SECTION, rest_rank=2, mixer="adaptive")
    fill(adapter)
    inputs = {path: watch(adapter, path) for path in adapter.targets}
    assert adapter.observed() == {}
    adapter.model.train()
    adapter.model(**batch)
    assert adapter.observed() == {}
    adapter.model.eval()
    for seen in inputs.values():
        seen.clear()
    adapter.model(**batch)
    weights, real = tensors(adapter, "mixer"), batch["attention_mask"].bool()
    values = [torch.softmax(seen[0][0] @ weights[f"{path}.G"].T, -1)[real][:, 1] for path, seen in inputs.items()]
    padded = [torch.softmax(seen[0][0] @ weights[f"{path}.G"].T, -1)[..., 1] for path, seen in inputs.items()]
    assert adapter.observed()["mixer_mean"] == pytest.approx(float(torch.cat(values).double().mean()), abs=1e-6)
    assert abs(float(torch.cat(values).mean()) - float(torch.stack(padded).mean())) > 1e-3
    assert adapter.observed() == {}


def test_what_trains_is_chosen_by_name(make: Make) -> None:
    adapter = attach_lora(make("bert"), SECTION, rest_rank=2, mixer="adaptive")
    b_size = sum(slot.size for slot in adapter.layout("lora").slots if slot.part == "B")
    adapter.set_trainable("lora.B", "head")
    assert adapter.num_trainable() == b_size + adapter.layout("head").size
    adapter.set_trainable("rest")
    assert adapter.num_trainable() == adapter.layout("rest").size
    assert {p.requires_grad for p in adapter.model.bert.embeddings.parameters()} == {False}
    with pytest.raises(KeyError, match="'lora'"):
        adapter.set_trainable("loar")
    with pytest.raises(KeyError, match="no part 'X'"):
        adapter.set_trainable("lora.X")


def test_tensors_are_named_by_group_and_slot(make: Make) -> None:
    adapter = attach_lora(make("bert"), SECTION, rest_rank=2)
    fill(adapter)
    named = adapter.tensors()
    query = "bert.encoder.layer.0.attention.self.query"
    assert named[f"lora.{query}.A"].shape == (3, 16)
    assert named[f"rest.{query}.B"].shape == (16, 2)
    assert named["head.classifier.weight.tensor"].shape == (3, 16)
    assert sum(tensor.size for tensor in named.values()) == sum(adapter.layout(name).size for name in adapter.names)


def test_a_wrong_vector_is_refused(make: Make) -> None:
    adapter = attach_lora(make("bert"), SECTION)
    right = adapter.read("lora")
    with pytest.raises(ValueError, match="has shape"):
        adapter.load("lora", right[:-1])
    wrong = right.copy()
    wrong[5] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        adapter.load("lora", wrong)
    assert np.array_equal(adapter.read("lora"), right)


def test_default_targets_are_query_and_value(make: Make, family: str) -> None:
    adapter = attach_lora(make(family), SECTION)
    assert {path.rpartition(".")[2] for path in adapter.targets} == set(TARGETS[family])
    assert len(adapter.targets) == 2 * len(TARGETS[family])
    modules = dict(make(family).named_modules())
    assert set(adapter.targets) <= set(modules)


def test_heads_and_output_layers_are_never_targets(make: Make) -> None:
    """RoBERTa's head and encoder both have a `dense`; Llama's output layer is as linear as any."""
    adapter = attach_lora(make("roberta"), LoraSection(targets=("dense",)))
    assert len(adapter.targets) == 2 * 3  # attention output, intermediate, output
    with pytest.raises(ConfigError, match=r"no linear layer 'lm_head'.*q_proj"):
        attach_lora(make("llama", causal=True), LoraSection(targets=("lm_head",)))


def test_unknown_targets_name_the_nearest(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"'querry' \(did you mean 'query'\?\).*dense"):
        attach_lora(make("bert"), LoraSection(targets=("querry",)))


def test_one_lora_per_model(make: Make) -> None:
    model = make("bert")
    attach_lora(model, SECTION)
    with pytest.raises(ValueError, match="already has a LoRA"):
        attach_lora(model, SECTION)


LAYOUT = Layout(
    (Slot("a.q", "A", (4, 64)), Slot("a.q", "B", (32, 4)), Slot("a.v", "A", (4, 64)), Slot("a.v", "B", (9, 4)))
)


def test_draws_are_keyed_by_slot() -> None:
    """A ~ U(−1/8, 1/8) for d_in = 64: inside the bound, and its variance is (1/8)²/3; B = 0."""
    vector = draw_lora(LAYOUT, 1, "lora", "client-3")
    views = LAYOUT.views(vector)
    assert not views["a.q.B"].any()
    assert not views["a.v.B"].any()
    assert np.abs(vector).max() <= 1 / 8
    both = np.concatenate([views["a.q.A"].ravel(), views["a.v.A"].ravel()])
    assert both.var() == pytest.approx(1 / 64 / 3, rel=0.2)
    assert not np.array_equal(views["a.q.A"], views["a.v.A"])
    alone = Layout(LAYOUT.slots[2:3])
    assert np.array_equal(draw_lora(alone, 1, "lora", "client-3"), views["a.v.A"].ravel())
    for other in (draw_lora(LAYOUT, 2, "lora", "client-3"), draw_lora(LAYOUT, 1, "lora", "client-4")):
        assert not np.array_equal(other, vector)


def test_mixer_draw() -> None:
    layout = Layout((Slot("a.q", "G", (2, 400)),))
    vector = draw_mixer(layout, 0)
    assert 0.9 / 20 < np.abs(vector).max() <= 1 / 20
    assert np.array_equal(vector, draw_mixer(layout, 0))


def test_as_many_rows_as_before_keep_the_parameter(make: Make) -> None:
    """An engine holds it. Row 4 stays, row 9 comes in as zeros; 1 and 9 are gone from what goes home."""
    adapter = attach_lora(make("bert"), SECTION)
    fill(adapter)
    whole, layout = adapter.read("lora"), adapter.layout("lora")
    adapter.set_rows(dict.fromkeys(adapter.targets, np.array([1, 4])))
    parameters = [layer.own_b for layer in adapter.targets.values()]
    adapter.set_rows(dict.fromkeys(adapter.targets, np.array([4, 9])))
    assert all(layer.own_b is b for layer, b in zip(adapter.targets.values(), parameters, strict=True))
    assert adapter.whole_layout("lora") == layout
    home = adapter.tensors()
    for slot, view in layout.items(whole):
        if slot.part == "B":
            view[np.setdiff1d(np.arange(16), [4])] = 0
        assert np.array_equal(home[f"lora.{slot.name}"], view)
    adapter.set_rows(None)
    assert np.array_equal(adapter.read("lora"), whole)
