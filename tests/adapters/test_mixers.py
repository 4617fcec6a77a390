"""What weighs the two branches of a LoRA layer, and the core, against plain formulas on the layer's own input."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from fedray.adapters.adapter import Adapter
from fedray.adapters.draws import draw_frames, draw_mixer
from fedray.adapters.layout import Layout, Slot
from fedray.adapters.lora import attach_lora
from fedray.adapters.mixers import Router
from fedray.config import LoraSection
from fedray.errors import ConfigError

Make = Callable[..., PreTrainedModel]
Batch = dict[str, Tensor]

SECTION = LoraSection(rank=2, alpha=4.0)
SCALE = 2.0


def fill(adapter: Adapter, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    for name in adapter.names:
        if name != "head":
            adapter.load(name, rng.normal(0, 0.5, adapter.layout(name).size).astype(np.float32))


def load(adapter: Adapter, group: str, part: str, value: float) -> None:
    """Set all values of one part of a group."""
    vector = adapter.read(group)
    vector[adapter.layout(group).mask({part})] = value
    adapter.load(group, vector)


def parts(adapter: Adapter, path: str) -> dict[str, np.ndarray]:
    """The layer's tensors by group.part, in float64."""
    found = {}
    for name in adapter.names:
        for slot, view in adapter.layout(name).items(adapter.read(name)):
            if slot.module == path:
                found[f"{name}.{slot.part}"] = view.astype(np.float64)
    return found


def pass_of(adapter: Adapter, make: Make, batch: Batch) -> tuple[str, np.ndarray, np.ndarray]:
    """Return the last target's path, its input x, and what the adapter adds to W0 x; [examples, tokens, d], float64."""
    path = list(adapter.targets)[-1]
    seen: list[tuple[Tensor, Tensor]] = []
    hook = adapter.targets[path].register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        adapter.model(**batch)
        base = make("llama").get_submodule(path)(seen[0][0])
    hook.remove()
    x, y = seen[0]
    return path, x.double().numpy(), (y - base).double().numpy()


def branch(t: dict[str, np.ndarray], group: str, x: np.ndarray) -> np.ndarray:
    return SCALE * x @ t[f"{group}.A"].T @ t[f"{group}.B"].T


def test_scalars_weigh_the_branches(make: Make, batch: Batch) -> None:
    """One number per target and branch, both 1 at first; what is added is w_L s B A x + w_R s B_R A_R x."""
    adapter = attach_lora(make("llama"), SECTION, rest_rank=3, mixer="scalars")
    assert {slot.part: slot.shape for slot in adapter.layout("mixer").slots} == {"w_R": (1, 1), "w_L": (1, 1)}
    assert (adapter.read("mixer") == 1).all()
    fill(adapter)
    path, x, added = pass_of(adapter, make, batch)
    t = parts(adapter, path)
    expected = t["mixer.w_L"] * branch(t, "lora", x) + t["mixer.w_R"] * branch(t, "rest", x)
    assert abs(float(t["mixer.w_L"] - t["mixer.w_R"])) > 0.1
    np.testing.assert_allclose(added, expected, atol=1e-5)


@pytest.mark.parametrize("weights", [(0.0, 1.0), (1.0, 0.0), (0.5, 0.5)])
def test_loaded_scalars_are_a_fixed_mixer(make: Make, batch: Batch, weights: tuple[float, float]) -> None:
    loaded = attach_lora(make("llama"), SECTION, rest_rank=2, mixer="scalars")
    fixed = attach_lora(make("llama"), SECTION, rest_rank=2, mixer=weights[1])
    fill(loaded)
    for name in ("lora", "rest"):
        fixed.load(name, loaded.read(name))
    load(loaded, "mixer", "w_R", weights[0])
    load(loaded, "mixer", "w_L", weights[1])
    assert torch.equal(loaded.model(**batch).logits, fixed.model(**batch).logits)


def test_a_learned_scalar_and_the_second_branch_have_their_gradients(make: Make, batch: Batch) -> None:
    """∂L/∂w_R = Σ ⟨δ, s B_R A_R x⟩ by finite differences; with "rest" declared, it trains like the first branch."""
    adapter = attach_lora(make("llama"), SECTION, rest_rank=2, mixer="scalars")
    fill(adapter)
    adapter.set_trainable("mixer.w_R", "rest")
    assert adapter.num_trainable() == len(adapter.targets) + adapter.layout("rest").size
    adapter.model(**batch).logits.square().sum().backward()
    entries = {entry.slot.name: entry for group in adapter.groups for entry in group.entries if group.name == "mixer"}
    path = list(adapter.targets)[-1]
    found = float(entries[f"{path}.w_R"].parameter.grad)
    assert entries[f"{path}.w_L"].parameter.grad is None
    (rest,) = [group for group in adapter.trainable_groups() if group.name == "rest"]
    assert all(parameter.grad.abs().max() > 0 for parameter in rest.parameters)
    losses = []
    with torch.no_grad():
        for step in (1e-2, -2e-2):
            entries[f"{path}.w_R"].parameter.add_(step)
            losses.append(float(adapter.model(**batch).logits.square().sum()))
    assert found == pytest.approx((losses[0] - losses[1]) / 2e-2, rel=2e-2)


def routed(logits: np.ndarray, others: int, present: np.ndarray) -> tuple[np.ndarray, float]:
    """FedLEASE's weights of one token, written as a loop: the others' [others], and one's own."""
    places = [0, *(1 + i for i in range(others) if present[i]), *(1 + others + i for i in range(others) if present[i])]
    exponentials = {place: np.exp(logits[place] - logits.max()) for place in places}
    chosen = sorted(places, key=lambda place: -exponentials[place])[: 1 + int(present.sum())]
    total = sum(exponentials[place] for place in chosen)
    weights = np.zeros(others)
    own = 0.0
    for place in chosen:
        share = exponentials[place] / total
        if 1 <= place <= others:
            weights[place - 1] = share
        else:
            own += share
    return weights, own


@given(seed=st.integers(0, 1000), others=st.integers(1, 4), exist=st.lists(st.booleans(), min_size=4, max_size=4))
def test_the_router_is_top_m_of_2m_minus_1(make: Make, seed: int, others: int, exist: list[bool]) -> None:
    """The weights sum to 1, at most M are not 0, one's own never is, and none is where no expert exists."""
    rng, router = np.random.default_rng(seed), Router(others, 5, torch.device("cpu"))
    present = np.array(exist[:others], float)
    with torch.no_grad():
        router.G.weight.copy_(torch.from_numpy(rng.normal(size=(1 + 2 * others, 5))))
        router.present.weight.copy_(torch.from_numpy(present[:, None]))
    x = torch.from_numpy(rng.normal(size=(3, 2, 5))).float()
    w_rest, w_own = (weight.detach().double().numpy() for weight in router(x))
    assert w_own.min() > 0
    np.testing.assert_allclose(w_rest.sum(-1) + w_own[..., 0], 1, atol=1e-6)
    logits = x.double().numpy() @ router.G.weight.detach().double().numpy().T
    for token in np.ndindex(3, 2):
        weights, own = routed(logits[token], others, present)
        np.testing.assert_allclose(w_rest[token], weights, atol=1e-6)
        np.testing.assert_allclose(w_own[token], own, atol=1e-6)


@pytest.mark.parametrize("others", [1, 3])
def test_experts_are_components_of_the_second_branch(make: Make, batch: Batch, others: int) -> None:
    """Added is s w_L B A x + s Σ_j w_j B_j A_j x; expert j has the components j r to (j + 1) r of the second branch."""
    adapter = attach_lora(make("llama"), SECTION, rest_rank=2 * others, mixer="experts")
    fill(adapter)
    load(adapter, "mixer", "present", 1.0)
    path, x, added = pass_of(adapter, make, batch)
    t = parts(adapter, path)
    logits, expected = x @ t["mixer.G"].T, np.zeros_like(added)
    for token in np.ndindex(x.shape[:2]):
        weights, own = routed(logits[token], others, np.ones(others))
        expected[token] = own * branch(t, "lora", x[token])
        for j in range(others):
            rows = slice(2 * j, 2 * j + 2)
            expected[token] += weights[j] * SCALE * x[token] @ t["rest.A"][rows].T @ t["rest.B"][:, rows].T
    np.testing.assert_allclose(added, expected, atol=1e-5)


def test_without_other_experts_it_is_a_lora(make: Make, batch: Batch) -> None:
    routing = attach_lora(make("llama"), SECTION, rest_rank=4, mixer="experts")
    plain = attach_lora(make("llama"), SECTION)
    fill(routing)
    load(routing, "mixer", "present", 0.0)
    plain.load("lora", routing.read("lora"))
    torch.testing.assert_close(routing.model(**batch).logits, plain.model(**batch).logits, atol=1e-6, rtol=0)


def test_a_core_stands_between_the_frames(make: Make, batch: Batch) -> None:
    """Added is s B R A x; R = 0 at first, so nothing; A's rows and B's columns are orthonormal; R alone trains."""
    adapter = attach_lora(make("llama"), SECTION, core=True)
    assert adapter.names == ("core", "frames", "head")
    assert {group.name for group in adapter.trainable_groups()} == {"core", "head"}
    assert torch.equal(adapter.model(**batch).logits, make("llama")(**batch).logits)
    path = list(adapter.targets)[-1]
    t = parts(adapter, path)
    np.testing.assert_allclose(t["frames.A"] @ t["frames.A"].T, np.eye(2), atol=1e-6)
    np.testing.assert_allclose(t["frames.B"].T @ t["frames.B"], np.eye(2), atol=1e-6)
    fill(adapter)
    path, x, added = pass_of(adapter, make, batch)
    t = parts(adapter, path)
    assert t["core.core"].shape == (2, 2)
    np.testing.assert_allclose(added, SCALE * x @ t["frames.A"].T @ t["core.core"].T @ t["frames.B"].T, atol=1e-5)


def test_frames_need_as_many_dimensions_as_the_rank(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"lora.rank.*17.*16"):
        attach_lora(make("bert"), LoraSection(rank=17), core=True)


def test_a_weaker_clients_frames_are_the_first_components() -> None:
    whole, held = (Layout((Slot("a", "A", (r, 6)), Slot("a", "B", (9, r)))) for r in (4, 2))
    full, part = whole.views(draw_frames(whole, 3)), held.views(draw_frames(held, 3))
    np.testing.assert_allclose(part["a.A"], full["a.A"][:2], atol=1e-6)
    np.testing.assert_allclose(part["a.B"], full["a.B"][:, :2], atol=1e-6)
    assert not np.array_equal(draw_frames(whole, 4), draw_frames(whole, 3))


def test_first_values_of_mixers() -> None:
    slots = (Slot("a", "w_R", (1, 1)), Slot("a", "w_L", (1, 1)), Slot("b", "G", (3, 25)), Slot("b", "present", (1, 1)))
    views = Layout(slots).views(draw_mixer(Layout(slots), 0))
    assert (views["a.w_R"], views["a.w_L"], views["b.present"]) == (1, 1, 0)
    assert 0.15 < np.abs(views["b.G"]).max() <= 0.2


@pytest.mark.parametrize(
    "kind",
    [{"core": True}, *({"rest_rank": 4, "mixer": mixer} for mixer in ("scalars", "experts", "similarity"))],
    ids=str,
)
def test_flat_state_round_trips_bit_for_bit(make: Make, kind: dict[str, object]) -> None:
    """All groups, whole and part by part."""
    adapter = attach_lora(make("bert"), SECTION, **kind)
    fill(adapter, 1)
    for name in adapter.names:
        vector = adapter.read(name)
        fill(adapter, 2)
        for part in dict.fromkeys(slot.part for slot in adapter.layout(name).slots):
            adapter.load(f"{name}.{part}", vector[adapter.layout(name).mask({part})])
        assert np.array_equal(adapter.read(name), vector)
        adapter.load(name, vector)
        assert np.array_equal(adapter.read(name), vector)
