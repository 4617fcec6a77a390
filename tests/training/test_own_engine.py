"""An engine of a user's own, from a file outside the package: run, refused, and its memory predicted."""

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from examples import EXAMPLES
from tiny import tiny_bert

import fedray
from fedray.config import dump_yaml, load_config
from fedray.config.yaml import parse_yaml
from fedray.errors import ConfigError
from fedray.experiment.prepare import prepare

SILENT = """
from my_engine import MyEngineConfig

from fedray.config import EngineConfig


class Silent(MyEngineConfig):
    memory = EngineConfig.memory


class NoEngine:
    pass
"""


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "my_engine.py").write_text(EXAMPLES["my_engine.py"])
    (tmp_path / "silent_engine.py").write_text(textwrap.dedent(SILENT))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in ("my_engine", "silent_engine"):
        sys.modules.pop(name, None)


def experiment(engine: Any, **changes: Any) -> dict[str, Any]:
    return {
        "rounds": 2,
        "method": "fedavg",
        "model": tiny_bert(hidden_size=32, num_hidden_layers=2, intermediate_size=64),
        "data": {"source": "synthetic", "examples_per_client": 16, "max_length": 16},
        "partition": {"kind": "by_file"},
        "clients": {"count": 3, "fuse": 3, "tiers": {"all": {"share": 1.0, "engine": engine}}},
        "train": {"lr": 0.05, "optimizer": "sgd", "clip": None},
        "device": "cpu",
        **changes,
    }


def trained(engine: Any, folder: Path, **changes: Any) -> Any:
    return fedray.run(experiment(engine, **changes), runtime="inline", output=folder)


def test_it_trains_as_plain_torch_does(tmp_path: Path) -> None:
    """Half the learning rate times two; clients of this engine are trained one by one, those of torch in one step."""
    own = trained(
        {"class": "my_engine.MyEngineConfig", "factor": 2},
        tmp_path / "own",
        train={
            "lr": 0.025,
            "optimizer": "sgd",
            "clip": None,
        },
    )
    torch = trained("torch", tmp_path / "torch")
    np.testing.assert_allclose(own.clients()["train_loss"], torch.clients()["train_loss"], rtol=1e-5)
    assert len(set(own.clients()["train_loss"].round(6))) > 3


def test_the_resolved_configuration_is_read_back() -> None:
    config = load_config(experiment({"class": "my_engine.MyEngineConfig", "factor": 2}))
    text = dump_yaml(config)
    assert parse_yaml(text, "it")["clients"]["tiers"]["all"]["engine"] == {
        "class": "my_engine.MyEngineConfig",
        "factor": 2.0,
    }
    assert load_config(parse_yaml(text, "it")) == config
    made = type(config.clients.tier("all").engine)(factor=2)
    assert made == config.clients.tier("all").engine


def test_its_memory_is_predicted_where_it_says_what_it_holds() -> None:
    """No optimizer state; everything else as with torch, whose momentum is zero here, too."""
    own, torch = (
        prepare(config).footprint(config.method[0], "all")
        for config in (load_config(experiment(e)) for e in ({"class": "my_engine.MyEngineConfig"}, "torch"))
    )
    assert own.device.resting < torch.device.resting  # three clients in one step hold three adapters
    assert (own.device.weights, own.device.optimizer, own.shared) == (torch.device.weights, 0, torch.shared)
    silent = load_config(experiment({"class": "silent_engine.Silent"}))
    with pytest.raises(ConfigError, match=r"method 'fedavg' on tier 'all': engine Silent: its memory"):
        prepare(silent).footprint(silent.method[0], "all")


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"class": "my_engine.MyEngineConfig", "fcator": 2}, "clients.tiers.all.engine.fcator: unknown key (did you"),
        ({"class": "my_engine.MyEngineConfig", "factor": 0}, "clients.tiers.all.engine.factor: got 0: Input should be"),
        (
            {"class": "silent_engine.NoEngine"},
            "must be a class derived from fedray.config.engine.EngineConfig",
        ),
        ({"class": "my_engine.Missing"}, "class 'my_engine.Missing' cannot be imported: AttributeError"),
        ({"class": "my_engine.MyEngineConfig", "name": "torch"}, "expected either `name` (built in) or `class`"),
        (
            {"class": "my_engine.MyEngineConfig", "offload": {"optimizer": "cpu"}},
            "clients.tiers.all: engine.offload: needs engine: deepspeed, got engine: MyEngineConfig",
        ),
        ({"name": "torch", "offload": "none"}, "engine.offload: needs engine: deepspeed, got engine: torch"),
        ({"factor": 1}, "clients.tiers.all.engine: got {'factor': 1}: expected deepspeed, torch, or a mapping with"),
    ],
)
def test_mistakes_are_named(engine: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(experiment(engine))
    assert message in str(caught.value)


def test_what_it_cannot_do_is_said_before_anything_starts() -> None:
    own = {"class": "my_engine.MyEngineConfig"}
    with pytest.raises(ConfigError, match=r"clients.tiers.all.engine: needs train.optimizer: sgd, got adamw"):
        prepare(load_config(experiment(own, train={"optimizer": "adamw"})))
    tiers = {"all": {"share": 1.0, "engine": own, "workers": 2}}
    with pytest.raises(ConfigError, match=r"workers: 2 processes train .* engine: torch, got MyEngineConfig"):
        load_config(experiment(own, clients={"tiers": tiers}))
