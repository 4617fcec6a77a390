"""Methods whose clients train parts, steer, or train several times: what is known of them before anything starts."""

from pathlib import Path
from typing import Any

import pytest
from examples import EXAMPLES

import fedray
from fedray.config import load_config
from fedray.errors import ConfigError, TrainingError
from fedray.experiment.outline import costs_from_configuration

CALLS = '''
from dataclasses import dataclass

from fedray.methods.fedavg import FedAvg
from fedray.training.steering import Proximal


class Calling:
    """A `local` whose train() gets the arguments that the method names."""

    def __init__(self, local, call):
        self._local, self._call = local, call

    def __getattr__(self, name):
        return getattr(self._local, name)

    def train(self):
        self._call(self._local)


@dataclass(frozen=True)
class Called(FedAvg):
    what: str = "plain"

    def train_client(self, adapter, client_state, downlink, local):
        def call(local):
            anchor = {"lora": downlink.adapter}
            match self.what:
                case "plain":
                    local.train(steps=2, measure=False)
                    local.train(epochs=1, phase=0)
                case "parts":
                    local.train(["lora.B"])
                case "steering":
                    local.train(steering=Proximal(anchor, 0.1))
                case "mean_gradient":
                    assert local.train(mean_gradient=True)["head"].shape == (adapter.layout("head").size,)
                case "late":
                    local.train(["head"] if local.server_round else None)
                case "undeclared":
                    local.train(["lora", "rest"])
                case "set_trainable":
                    adapter.set_trainable("head")
                    local.train()

        return super().train_client(adapter, client_state, downlink, Calling(local, call))
'''
OLD_ENGINE = """
from my_engine import MyEngineConfig


class Old(MyEngineConfig):
    @property
    def steers(self):
        return False
"""
STEERED = ["parts", "steering", "mean_gradient", "late"]


@pytest.fixture
def calling(own_folder: Path, smallest: dict[str, Any]) -> dict[str, Any]:
    """A configuration beside `calls.py`, and beside an engine of a user's own."""
    (own_folder / "calls.py").write_text(CALLS)
    (own_folder / "my_engine.py").write_text(EXAMPLES["my_engine.py"])
    (own_folder / "old_engine.py").write_text(OLD_ENGINE)
    return smallest


def plan(base: dict[str, Any], what: str, **tier: Any) -> Any:
    clients = {**base.get("clients", {}), "tiers": {"weak": {"share": 1.0, **tier}}}
    method = {"class": "calls.Called", "what": what}
    train = {"optimizer": "sgd", "clip": None} if isinstance(tier.get("engine"), dict) else {}
    config = load_config({**base, "clients": clients, "method": method, "train": train})
    (found,) = costs_from_configuration(config).values()
    return found["weak"]


@pytest.mark.parametrize("what", ["plain", *STEERED])
def test_what_the_second_round_trains_is_counted(calling: dict[str, Any], what: str) -> None:
    """All that attach() declares, unless the round's calls name parts of it."""
    found = plan(calling, what)
    lora_b, head, whole = 256, 68, 580
    assert found.trainable == {"parts": lora_b, "late": head}.get(what, whole)
    assert found.asked == {"plain": set(), "late": {"parts"}}.get(what, {what})


@pytest.mark.parametrize("what", STEERED)
@pytest.mark.parametrize(
    ("tier", "engine"),
    [
        ({"engine": "deepspeed", "offload": {"optimizer": "cpu"}}, "deepspeed"),
        ({"engine": "deepspeed", "offload": {"params": "cpu"}}, "deepspeed"),
        ({"engine": {"class": "old_engine.Old"}}, "Old"),
    ],
    ids=["stage 2", "stage 3", "own"],
)
def test_an_engine_that_cannot_do_it_is_refused_first(
    calling: dict[str, Any], what: str, tier: dict[str, Any], engine: str
) -> None:
    asked = "parts" if what == "late" else what
    remedy = ", or offload: none" if engine == "deepspeed" else "$"
    with pytest.raises(ConfigError, match=rf"'Called' on tier 'weak': .*\(\) with {asked}, .* {engine} .*{remedy}"):
        plan(calling, what, **tier)
    assert plan(calling, "plain", **tier).asked == set()


@pytest.mark.parametrize("engine", ["torch", "deepspeed", {"class": "my_engine.MyEngineConfig"}], ids=str)
def test_other_engines_do_it(calling: dict[str, Any], engine: Any) -> None:
    assert plan(calling, "steering", engine=engine).asked == {"steering"}


def test_mistakes_are_named_before_anything_starts(calling: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"method 'Called'.*no group 'rest'"):
        plan(calling, "undeclared")
    with pytest.raises(ConfigError, match=r"method 'Called': set_trainable\(\) is for the method's attach\(\)"):
        plan(calling, "set_trainable")


def test_the_documentations_engine_trains_parts_and_steers(calling: dict[str, Any]) -> None:
    """As torch does, whose learning rate is its own times the factor 1."""
    methods = [{"class": "calls.Called", "what": what, "label": what} for what in ("parts", "steering")]
    found = []
    for name, engine in (("own", {"class": "my_engine.MyEngineConfig"}), ("torch", "torch")):
        clients = {**calling.get("clients", {}), "tiers": {"all": {"share": 1.0, "engine": engine}}}
        train = {"optimizer": "sgd", "clip": None, "lr": 0.05}
        result = fedray.run({**calling, "clients": clients, "train": train}, method=methods, output=name)
        found.append(result.clients()["train_loss"].to_numpy())
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_what_trains_is_settled_on_every_engine(start: Any, engine: str) -> None:
    run = start("fedavg", clients__tiers={"all": {"share": 1.0, "engine": engine}})
    with pytest.raises(TrainingError, match=r"train_client, call local.train\(parts="):
        run.adapter.set_trainable("head")
