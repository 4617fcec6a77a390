"""Options that cross methods: server optimizers, masks and adapter kinds work under every method that has the option,
or are refused with a reason before anything trains. The sets here are those of docs/methods.md."""

import numpy as np
import pytest
from every_method import entry

from fedray.errors import ConfigError
from fedray.methods.registry import METHODS
from fedray.storage.state_tree import leaves

ANY = {"fedavg", "fedbabu", "fedper", "fedrep", "head_only", "local"}
"""Methods that train any adapter."""

FITTING = {
    "reft": ANY | {"fedalt"},
    "full": ANY | {"ditto", "fedprox", "scaffold"},
    "core": ANY | {"ditto", "fedprox", "scaffold", "fed_sb"},
}
"""Methods by the adapters that they train besides LoRA, which all but Fed-SB do."""

UNMASKED = {"fed_sb", "fedsa_lora", "rolora", "scaffold"}
"""Methods that refuse masks."""

SMALL = {"model__config__num_hidden_layers": 1, "train__max_steps": 2}
HALF = {"all": {"share": 1.0, "mask_ratio": 0.5}}


def with_option(option):
    return [name for name in METHODS.names if option in METHODS.find(name).__dataclass_fields__]


def distance(server, other):
    """How far apart the values of two states of one method are."""
    ours, theirs = (dict(leaves(state)) for state in (server, other))
    arrays = [path for path, value in theirs.items() if isinstance(value, np.ndarray) and path in ours]
    return max(float(np.abs(ours[path] - theirs[path]).max(initial=0)) for path in arrays)


@pytest.mark.parametrize("name", with_option("server_optimizer"))
@pytest.mark.parametrize(
    "optimizer", [{"name": "adam", "lr": 0.02}, {"name": "momentum", "beta": 0.5}], ids=["adam", "m"]
)
def test_server_optimizers_move_what_is_averaged(start, name, optimizer):
    plain, moved = start(entry(name), **SMALL), start(entry(name, server_optimizer=optimizer), **SMALL)
    for run in (plain, moved):
        done = run.rounds(3)[-1]
        assert np.isfinite([result.report.train_loss for result in done.results]).all()
    assert distance(moved.server, plain.server) > 1e-5


@pytest.mark.parametrize("name", with_option("mask"))
def test_masked_clients_send_less_or_masks_are_refused(start, name):
    changes = {**SMALL, "clients__tiers": HALF}
    if name in UNMASKED:
        with pytest.raises(ConfigError, match=rf"^{name}\.mask: "):
            start(entry(name, mask="energy"), **changes)
        return
    masked = start(entry(name, mask="energy"), **changes)
    plain = start(entry(name), **changes)
    for one, other in zip(masked.rounds(2), plain.rounds(2), strict=True):
        for less, whole in zip(one.results, other.results, strict=True):
            assert less.uplink_bytes < whole.uplink_bytes
            assert less.downlink_bytes == whole.downlink_bytes or name == "fedalt"


@pytest.mark.parametrize("name", ["ditto", "fedprox", "scaffold"])
@pytest.mark.parametrize("kind", ["noreft", "nodireft"])
def test_interventions_without_rotation_are_steered(start, name, kind):
    run = start(entry(name, adapter="reft"), reft__kind=kind, **SMALL)
    done = run.rounds(2)[-1]
    assert np.isfinite([result.report.train_loss for result in done.results]).all()
    assert not np.array_equal(run.server.shared.adapter, run.initial.vectors["reft"])


@pytest.mark.parametrize("name", with_option("adapter"))
@pytest.mark.parametrize("kind", ["lora", "reft", "core", "full"])
def test_adapters_train_or_are_refused(start, name, kind):
    if name not in FITTING.get(kind, METHODS.names) or (name, kind) == ("fed_sb", "lora"):
        with pytest.raises(ConfigError, match=f"{kind}.*use "):
            start(entry(name, adapter=kind), **SMALL)
        return
    run = start(entry(name, adapter=kind), **SMALL)
    done = run.rounds(2)[-1]
    assert np.isfinite([result.report.train_loss for result in done.results]).all()
    group = run.method.adapter.group
    assert not np.array_equal(run.adapter.read(group), run.initial.vectors[group])
