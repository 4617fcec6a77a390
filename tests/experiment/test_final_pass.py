"""The final pass without training (`evaluation.final: aggregated`): what it measures is what the whole one measures
before it trains, and there is nothing of what follows."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from safetensors.numpy import load_file
from tiny import tiny_bert
from typer.testing import CliRunner

import fedray
from fedray.cli.app import app
from fedray.config import dump_yaml, load_config
from fedray.errors import ComparisonError

METHODS = ["local", "fedavg", "fedreft", "fedalt", "ditto", "feddpa", "fdlora", "fedbabu"]
"""Among them methods that evaluate before they train, train several times, or measure what they load after training."""

BASE: dict[str, Any] = {
    "rounds": 1,
    "seed": 3,
    "method": METHODS,
    "model": tiny_bert(max_position_embeddings=32, num_hidden_layers=1, initializer_range=0.2),
    "data": {"source": "synthetic", "examples_per_client": 20, "max_length": 16},
    "partition": {"kind": "by_file", "validation_fraction": 0.2, "test_fraction": 0.3},
    "clients": {"count": 3, "per_round": 2},
    "lora": {"rank": 2},
    "reft": {"rank": 2},
    "train": {"batch_size": 8, "lr": 0.02},
    "evaluation": {"examples": True},
    "device": "cpu",
    "runtime": "inline",
}
KEYS = ["method", "client", "examples", "metric"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("runs")
    whole = fedray.run(BASE, output=folder / "both")
    short = fedray.run(BASE, output=folder / "aggregated", evaluation={"final": "aggregated"})
    return SimpleNamespace(whole=whole, short=short)


def measured(run: fedray.RunResult, phase: str, moment: str) -> pd.DataFrame:
    table = run.evaluations()
    return table[(table.phase == phase) & (table.moment == moment)].set_index(KEYS).sort_index()


def test_rounds_and_states_are_the_same(runs: SimpleNamespace) -> None:
    for whole, short in zip(runs.whole.summaries, runs.short.summaries, strict=True):
        assert (short.state_sha256, short.uplink_bytes) == (whole.state_sha256, whole.uplink_bytes)
    for moment in ("aggregated", "personalised"):
        pd.testing.assert_frame_equal(*(measured(run, "train", moment) for run in (runs.whole, runs.short)))


def test_what_is_measured_before_training_is_the_same(runs: SimpleNamespace) -> None:
    """Test and validation examples, bit for bit; and every example's own values."""
    expected, found = (measured(run, "final", "aggregated") for run in (runs.whole, runs.short))
    pd.testing.assert_frame_equal(expected, found)
    assert len(found) == 2 * 3 * len(METHODS)
    each = [run.examples().query("moment == 'aggregated'").reset_index(drop=True) for run in (runs.whole, runs.short)]
    pd.testing.assert_frame_equal(*each)
    for one, other in zip(runs.whole.summaries, runs.short.summaries, strict=True):
        assert (one.aggregated_mean, one.validation_aggregated_mean) == (
            other.aggregated_mean,
            other.validation_aggregated_mean,
        )


def test_nothing_is_trained_and_nothing_measured_after(runs: SimpleNamespace) -> None:
    assert measured(runs.short, "final", "personalised").empty
    assert set(runs.short.examples().moment) == {"aggregated"}
    final = runs.short.clients().query("phase == 'final'")
    assert set(final.steps) == {0}
    assert final[["train_loss", "personalised_metric", "personalised_loss"]].isna().all(axis=None)
    assert final.test_examples.tolist() == runs.whole.clients().query("phase == 'final'").test_examples.tolist()
    rounds = runs.short.rounds().query("phase == 'final'")
    columns = [name for name in rounds if "personalised" in name]
    assert len(columns) >= 8
    assert rounds[[*columns, "train_loss"]].isna().all(axis=None)
    assert all(
        value is None for entry in runs.short.summaries for name, value in vars(entry).items() if "personalised" in name
    )


def test_the_adapters_are_those_that_were_measured(runs: SimpleNamespace) -> None:
    """FedAvg's clients hold the server's adapter, which the whole pass trains on."""
    short, whole = (
        [load_file(path) for path in sorted((run.path / "adapters" / "fedavg" / "clients").iterdir())]
        for run in (runs.short, runs.whole)
    )
    assert len(short) == 3
    for one, other in zip(short, whole, strict=True):
        assert all((one[name] == short[0][name]).all() for name in one)
        assert any((one[name] != other[name]).any() for name in one)


def test_clients_in_one_step(runs: SimpleNamespace, tmp_path: Path) -> None:
    fused = fedray.run(
        BASE, method=["fedavg", "ditto"], clients={"fuse": 3}, evaluation={"final": "aggregated"}, output=tmp_path / "f"
    )
    expected, found = measured(runs.short, "final", "aggregated"), measured(fused, "final", "aggregated")
    assert measured(fused, "final", "personalised").empty
    assert found.loss.tolist() == pytest.approx(expected.loc[["ditto", "fedavg"]].loss.tolist(), rel=1e-4)


def test_comparisons_are_of_what_all_runs_have(runs: SimpleNamespace) -> None:
    assert runs.whole.compare().moment == "personalised"
    assert runs.short.compare().moment == "aggregated"
    with pytest.raises(ComparisonError, match=r"no personalised score: evaluation\.final is aggregated"):
        runs.short.compare(moment="personalised")


def test_the_console_has_no_empty_columns(tmp_path: Path) -> None:
    changes = {"method": ["local", "fedavg"], "evaluation.final": "aggregated"}
    (tmp_path / "job.yaml").write_text(dump_yaml(load_config(BASE, changes)))
    ended = CliRunner().invoke(
        app, ["run", str(tmp_path / "job.yaml"), "--output", str(tmp_path / "run")], env={"COLUMNS": "120"}
    )
    assert ended.exit_code == 0, ended.output
    table = ended.stdout[ended.stdout.index("on each client's own test examples") :]
    assert "aggre-" in table
    assert "Δ to local" in table
    assert "person-" not in table
    assert "worst" not in table
    (line,) = [line for line in ended.stdout.splitlines() if line.startswith("fedavg: final pass")]
    assert "aggregated" in line
    assert "personalised" not in line
    assert "loss" not in line
