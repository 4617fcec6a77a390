"""An adapter kind of a user's own, from a file outside the package: run, refused, and its memory predicted."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from examples import EXAMPLES
from tiny import tiny_bert

import fedray
from fedray.config import load_config
from fedray.errors import ConfigError
from fedray.experiment.prepare import prepare
from fedray.federation.worker import Worker


@pytest.fixture(autouse=True)
def _file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "my_kind.py").write_text(EXAMPLES["my_kind.py"] + "\n\nclass NoKind:\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("my_kind", None)


def experiment(adapter: Any, method: str = "fedavg", **changes: Any) -> dict[str, Any]:
    return {
        "rounds": 2,
        "method": {"name": method, "adapter": adapter},
        "model": tiny_bert(hidden_size=32, num_hidden_layers=2, intermediate_size=64),
        "data": {"source": "synthetic", "examples_per_client": 16, "max_length": 16},
        "partition": {"kind": "by_file"},
        "clients": {"count": 3},
        "train": {"lr": 0.05},
        "device": "cpu",
        **changes,
    }


BIASES = {"class": "my_kind.BiasKind", "targets": ["query", "value"]}


@pytest.mark.parametrize("method", ["fedavg", "local", "head_only"])
def test_it_trains(method: str, tmp_path: Path) -> None:
    """Two layers with 32 biases of query and value each; clients that were to be batched are trained one by one."""
    experiments = experiment(BIASES, method, clients={"count": 3, "fuse": 3})
    run = fedray.run(experiments, runtime="inline", output=tmp_path / "run")
    assert run.clients()["train_loss"].notna().all()
    prepared = prepare(load_config(experiments))
    (cost,) = prepared.costs[method].values()
    assert cost.trainable == 2 * 2 * 32 + 33 * len(prepared.data.label_names)


def test_its_memory_is_predicted() -> None:
    """Nothing is inserted; gradients of 128 biases and of the head, two moments each and a step per tensor."""
    config = load_config(experiment(BIASES))
    prepared = prepare(config)
    found = prepared.footprint(config.method[0], "default").device
    head = 4 * len(prepared.data.label_names) * 33
    assert found.adapter == 0
    assert found.gradients == 4 * 128 + head
    assert found.optimizer == 2 * found.gradients + 4 * (4 + 2)
    assert found.activations > 0


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({**BIASES, "tragets": ["key"]}, "method 'fedavg': adapter.tragets: unknown key (did you mean 'targets'?)"),
        ({**BIASES, "targets": 3}, "method 'fedavg': adapter.targets: got 3: "),
        ({"class": "my_kind.NoKind"}, "my_kind.NoKind must be a class derived from fedray.adapters.kind.AdapterKind"),
        ({"class": "my_kind.Missing"}, "adapter: class 'my_kind.Missing' cannot be imported: AttributeError"),
        (
            "loar",
            "method 'fedavg': adapter: unknown adapter kind 'loar' (did you mean 'lora'?); allowed: core, full, lora",
        ),
        (3, "method 'fedavg': adapter: expected the name of an adapter kind or a mapping with `class`, got 3"),
        ({**BIASES, "targets": ["querry"]}, "adapter.targets: the model has no linear layers with a bias among"),
    ],
)
def test_mistakes_are_named(adapter: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare(load_config(experiment(adapter)))
    assert message in str(caught.value)


def test_a_section_that_the_kind_does_not_read_is_refused() -> None:
    changed = experiment(BIASES)
    changed["method"]["lora"] = {"rank": 2}
    with pytest.raises(ConfigError, match=r"has no use for the section 'lora' without `adapter: lora`"):
        prepare(load_config(changed))


def test_the_base_models_own_parameters_train_in_mixed_precision() -> None:
    """Biases of a bfloat16 model keep updates of 1e-6, and all else stays bfloat16."""
    tiers = {"weak": {"share": 1.0, "precision": "bfloat16"}}
    config = load_config(experiment(BIASES, clients={"count": 3, "tiers": tiers}))
    (entry,), worker = config.method, Worker()
    worker.setup(prepare(config).worker_setups(entry)["weak"])
    adapter = worker.adapter
    types = {name: parameter.dtype for name, parameter in adapter.model.named_parameters()}
    biases = {name for name, dtype in types.items() if dtype == torch.float32 and "classifier" not in name}
    assert biases == {name for name in types if name.endswith(("query.bias", "value.bias"))}
    changed = adapter.read("bias") + np.float32(1e-6)
    adapter.load("bias", changed)
    assert np.array_equal(adapter.read("bias"), changed)
