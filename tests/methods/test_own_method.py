"""A method of the user's own: one file, used by its path in the configuration."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from examples import EXAMPLES

import fedray
from fedray.config import load_config
from fedray.errors import ConfigError
from fedray.methods.registry import build_method

SMOOTHED = '''
from dataclasses import dataclass, replace

from fedray.methods.fedavg import FedAvg


@dataclass(frozen=True)
class Smoothed(FedAvg):
    """FedAvg whose server keeps a share of its adapter in each round."""

    keep: float = 0.5

    def aggregate_train(self, server, updates):
        new, metrics = super().aggregate_train(server, updates)
        mixed = self.keep * server.shared.adapter + (1 - self.keep) * new.shared.adapter
        return replace(new, shared=replace(new.shared, adapter=mixed)), {**metrics, "kept": self.keep}
'''


@pytest.fixture
def own(own_folder: Path, smallest: dict[str, Any]) -> dict[str, Any]:
    """A configuration beside `my_method.py`."""
    (own_folder / "my_method.py").write_text(SMOOTHED)
    return smallest


def test_it_runs_beside_builtin_methods(own: dict[str, Any]) -> None:
    """A server that keeps nothing is FedAvg's, up to the order in which updates are averaged; one that keeps half of
    its adapter is not. What it measures has a column."""
    methods = [
        "fedavg",
        {"class": "my_method.Smoothed"},
        {"class": "my_method.Smoothed", "label": "none", "keep": 0},
    ]
    result = fedray.run(own, method=methods, output="run")
    assert [summary.method for summary in result.summaries] == ["fedavg", "Smoothed", "none"]
    assert result["none"].personalised_mean == pytest.approx(result["fedavg"].personalised_mean)
    assert result["Smoothed"].uplink_bytes == result["fedavg"].uplink_bytes > 0
    assert result["Smoothed"].state_sha256 != result["none"].state_sha256
    rounds = result.rounds().query("method == 'Smoothed' and phase == 'train'")
    assert rounds["kept"].tolist() == [0.5, 0.5]


def test_the_documentations_method_has_fedavg_as_its_special_case(own: dict[str, Any], own_folder: Path) -> None:
    """Momentum 0, up to the order in which updates are averaged; with momentum, the second round is another."""
    (own_folder / "momentum.py").write_text(EXAMPLES["my_method.py"])
    methods = ["fedavg", *({"class": "momentum.FedAvgM", "label": str(m), "momentum": m} for m in (0.0, 0.9))]
    result = fedray.run(own, method=methods, output="run")
    losses = result.clients().pivot_table(index=["server_round", "client"], columns="method", values="train_loss")
    assert losses["0.0"].to_numpy() == pytest.approx(losses["fedavg"].to_numpy(), rel=1e-5)
    assert (losses["0.9"].to_numpy() == pytest.approx(losses["fedavg"].to_numpy(), rel=1e-5)) is False
    assert result["0.9"].uplink_bytes == result["fedavg"].uplink_bytes


def run_script(code: str, runtime: str, config: dict[str, Any]) -> "subprocess.CompletedProcess[str]":
    """Run a script that contains a class of its user's and starts an experiment."""
    start = f"import fedray\n    fedray.run({config | {'runtime': runtime}!r}, output='run')"
    Path("script.py").write_text(f'{code}\n\nif __name__ == "__main__":\n    {start}\n')
    return subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, timeout=300)


def test_a_script_that_contains_its_method(own: dict[str, Any]) -> None:
    """The script's classes exist twice, as those of `__main__` and of the module that the configuration names."""
    ended = run_script(EXAMPLES["my_method.py"], "inline", own | {"method": {"class": "script.FedAvgM"}})
    assert ended.returncode == 0, ended.stderr
    assert fedray.RunResult.load("run")["FedAvgM"].rounds == 2


def test_a_class_of_the_running_script_cannot_be_used_on_ray(own: dict[str, Any]) -> None:
    ended = run_script(EXAMPLES["my_method.py"], "ray", own | {"method": {"class": "__main__.FedAvgM"}})
    assert "method.0.class: __main__.FedAvgM is defined in the script that runs" in ended.stderr


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            {"class": "my_method.Smoothed", "kep": 0.1},
            r"^method 'Smoothed': unknown hyperparameter 'kep' \(did you mean 'keep'\?\); allowed: adapter, weights, ",
        ),
        ({"class": "my_method.Smoothed", "keep": "much"}, "^method 'Smoothed': keep: got 'much': "),
        ({"class": "my_method.Smoothed", "keep": True}, "^method 'Smoothed': keep: expected a number, got true"),
        ({"class": "my_method.Smothed"}, "^method 'Smothed': class 'my_method.Smothed' cannot be imported"),
        ({"class": "collections.Counter"}, "^method 'Counter': collections.Counter must be a dataclass with the fun"),
    ],
)
def test_mistakes_are_named(own: dict[str, Any], method: Any, message: str) -> None:
    config = load_config(own, {"method": method})
    with pytest.raises(ConfigError, match=message):
        build_method(config, config.method[0])
