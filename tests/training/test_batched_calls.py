"""Batched clients that train parts, several times, or steered, against the same clients one by one."""

import numpy as np
import pytest
from members import alone, compare, first_values, fused

from fedray.adapters.reft import attach_reft
from fedray.adapters.stacked import AdapterStack
from fedray.config import ReftSection
from fedray.errors import TrainingError
from fedray.training.steering import Proximal, Shift, Tail


def steered(kind):
    """Every client's own steering of everything, of unequal strength."""

    def steering(local):
        adapter, number = local._backend.adapter, sum(map(ord, local.client.id))
        vectors = first_values(adapter, local.client.id + "'s")
        if kind == "proximal":
            return Proximal(vectors, number / 300)
        if kind == "part":
            size = sum(slot.size for slot in adapter.layout("lora").slots if slot.part == "B")
            return Proximal({"lora.B": np.ones(size, np.float32)}, number / 300)
        return Shift(vectors) if kind == "shift" else Tail(number % 2, number / 300)

    return steering


def two_phases(local):
    local.train(["head"], epochs=2, measure=False)
    local.train(["lora"])


def alternating(local):
    """bob and dee begin with the other factor."""
    first, second = (["lora.A"], ["lora.B", "head"]) if local.client.id in ("ann", "cid") else (["lora.B"], ["lora.A"])
    local.train(first, steps=2)
    local.train(second)


def twice(local):
    local.train(steps=2, steering=steered("proximal")(local))
    local.train(phase=0, steering=steered("shift")(local))
    local.measure()


KINDS_OF_CALLS = {
    "A": lambda local: local.train(["lora.A"]),
    "B and head": lambda local: local.train(["lora.B", "head"]),
    "head": lambda local: local.train(["head"]),
    "steps": lambda local: local.train(steps=len(local.client.id) + sum(map(ord, local.client.id)) % 3),
    **{kind: lambda local, kind=kind: local.train(steering=steered(kind)(local)) for kind in ("proximal", "shift")},
    **{kind: lambda local, kind=kind: local.train(steering=steered(kind)(local)) for kind in ("tail", "part")},
    "steered part": lambda local: local.train(["lora.B"], steering=steered("proximal")(local)),
    "two phases": two_phases,
    "alternating": alternating,
    "twice": twice,
}


@pytest.mark.parametrize("training", KINDS_OF_CALLS.values(), ids=KINDS_OF_CALLS)
@pytest.mark.parametrize(
    "train",
    # Without this eps, Adam magnifies the rounding of gradients that are nearly zero.
    [
        {"weight_decay": 0.1, "clip": 0.5, "eps": 1e-5},
        {"optimizer": "sgd", "momentum": 0.5, "weight_decay": 0.1, "clip": 0.5},
    ],
    ids=["adamw", "sgd"],
)
def test_calls_of_all_kinds_are_as_alone(adapt, locals_of, train, training):
    adapter = adapt(dropout=0.3)
    locals_ = locals_of(adapter, measure=True, lr=0.01, batch_size=2, epochs=2, schedule="linear", **train)
    values = {name: first_values(adapter, name) for name in locals_}
    expected = alone(adapter, locals_, values, training)
    compare(fused(adapter, locals_, values, training=[training]), expected, values)
    trained = adapter.num_trainable()
    assert trained == adapter.layout("lora").size + adapter.layout("head").size  # nothing stays narrowed


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
@pytest.mark.parametrize("parts", [None, ["lora.B"]], ids=str)
def test_mean_gradients_are_as_alone(adapt, locals_of, task, parts):
    """Members end at different steps: each mean is over its own."""
    adapter = adapt(task, dropout=0.3)
    locals_ = locals_of(adapter, task, lr=0.01, batch_size=2)
    values = {name: first_values(adapter, name) for name in locals_}
    found = []

    def training(local):
        found.append((local.client.id, local.train(parts, mean_gradient=True, steering=steered("proximal")(local))))

    expected = alone(adapter, locals_, values, training)
    wanted, found = dict(found), []
    compare(fused(adapter, locals_, values, training=[training]), expected, values)
    assert sorted(dict(found)) == sorted(wanted)
    for name, mean in found:
        for group, vector in mean.items():
            assert np.linalg.norm(vector - wanted[name][group]) <= 1e-5 * np.linalg.norm(wanted[name][group])
        assert mean["lora"].any()


def test_calls_of_one_kind_are_served_together(adapt, locals_of):
    """Four clients of equal steps: two phases of two passes each, whatever their phase, anchor and strength."""
    adapter, seen = adapt(), []
    clients = dict.fromkeys(("ann", "bob", "cid", "dee"), 4)
    locals_ = locals_of(adapter, clients=clients, batch_size=2)
    adapter.model.register_forward_hook(lambda *_: seen.append(1))

    def training(local):
        local.train(["head"], steering=steered("proximal")(local), phase=3 if local.client.id == "bob" else None)
        local.train(["lora"])

    fused(adapter, locals_, {name: first_values(adapter, name) for name in locals_}, training=[training])
    assert len(seen) == 4


def test_steered_interventions_are_as_alone(backbone, locals_of):
    """Where an intervention has no tokens in a member's step, that member is not steered there."""
    adapter = attach_reft(backbone("causal_lm"), ReftSection(rank=2, kind="nodireft", positions="f1+l2"), seed=1)
    locals_ = locals_of(adapter, "causal_lm", batch_size=1, lr=0.01, weight_decay=0.1)
    values = {name: first_values(adapter, name) for name in locals_}

    def training(local):
        local.train(["reft"], steering=steered("proximal")(local), mean_gradient=True)

    compare(fused(adapter, locals_, values, training=[training]), alone(adapter, locals_, values, training), values)


def test_a_member_refuses_set_trainable(adapt):
    with pytest.raises(TrainingError, match=r"train\(parts="):
        AdapterStack(adapt(), 2).member(1).set_trainable("head")
