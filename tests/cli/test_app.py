"""The command line as a user meets it: exit codes, one message, nothing overwritten."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import tiny_bert
from typer.testing import CliRunner

import fedray
from fedray.cli.app import app
from fedray.methods.registry import METHODS

CONFIG: dict[str, Any] = {
    "name": "cli",
    "rounds": 1,
    "method": ["local", "fedalt"],
    "model": tiny_bert(),
    "data": {"source": "synthetic", "examples_per_client": 20, "max_length": 24},
    "partition": {"kind": "by_file"},
    "clients": {"count": 3},
    "runtime": "inline",
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_run_ends_with_the_table_and_where_the_results_are(config: Path, tmp_path: Path) -> None:
    result = call("run", config, "rounds=2", "train.lr=1e-3", "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert f"results: {tmp_path / 'out'}" in result.stdout.replace("\n", "")
    assert "fedalt: round 1:" in result.stdout
    assert "fedalt: final pass:" in result.stdout
    assert "peak memory of a client actor" in result.stdout
    summaries = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [entry["method"] for entry in summaries] == ["local", "fedalt"]
    resolved = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert (resolved["rounds"], resolved["train"]["lr"]) == (2, 1e-3)


def test_a_run_is_continued_with_more_rounds(config: Path, tmp_path: Path) -> None:
    assert call("run", config, "--output", tmp_path / "out").exit_code == 0
    result = call("run", config, "rounds=3", "--resume", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "fedalt: 3 rounds, continued after 1" in result.stdout
    refused = call("run", config, "rounds=3", "train.lr=1", "--resume", tmp_path / "out")
    assert refused.exit_code == 2
    assert "train.lr: stored is 0.0005, given is 1.0" in refused.stderr


def test_an_output_that_holds_something_is_never_touched(config: Path, tmp_path: Path) -> None:
    precious = tmp_path / "out" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("years of work")
    result = call("run", config, "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert "not empty" in result.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]
    assert precious.read_text() == "years of work"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("rounds=0", ["rounds", "got 0", "greater than or equal to 1"]),
        ("lora.rnk=4", ["lora.rnk", "did you mean 'rank'"]),
        ("method=fedrelt", ["fedrelt", "did you mean 'fedreft'"]),
        ("method=[{name: fedalt, mixr: none}]", ["mixr", "did you mean 'mixer'"]),
        ("lora.targets=[querry]", ["querry", "did you mean 'query'"]),
        ("reft.layers=[7]", ["7"]),
        ("clients.per_round=4", ["per_round", "4", "3"]),
        ("model.path=./nowhere", ["nowhere"]),
        ("rounds", ["section.key=value"]),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(config: Path, tmp_path: Path, override: str, says: list[str]) -> None:
    call_with = [override, "method=fedreft"] if override.startswith("reft") else [override]
    result = call("run", config, *call_with, "--output", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert all(word in result.stderr for word in says), result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    result = call("run", tmp_path / "absent.yaml")
    assert result.exit_code == 2
    assert "absent.yaml" in result.stderr


def test_validate_shows_clients_and_costs_and_trains_nothing(config: Path, tmp_path: Path) -> None:
    result = call("validate", config, f"storage_path={tmp_path / 'runs'}", "--show", 2)
    assert result.exit_code == 0, result.output
    assert "the experiment is valid" in result.stdout
    assert result.stdout.count(" tokens, label ") == 2
    assert "<bos>|" in result.stdout
    assert "fedalt" in result.stdout
    assert not (tmp_path / "runs").exists()


def test_validate_shows_the_common_test_set(config: Path, tmp_path: Path) -> None:
    """Of files, whose clients own nothing of it."""
    for name, count in (("train", 30), ("common", 7)):
        lines = [json.dumps({"text": f"{name} {i}", "label": i % 2}) for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    data = {"source": "files", "files": {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "common")}}
    files = [f"data={json.dumps(data)}", "partition={kind: iid}"]
    result = call("validate", config, *files)
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.stdout.splitlines() if "common test set" in line]
    assert line.split()[3:] == ["7"]


def test_params_needs_no_data_where_the_configuration_says_the_classes(config: Path) -> None:
    result = call("params", config, "model.config.num_labels=5", "model.config.vocab_size=300", "data.libraries=[]")
    assert result.exit_code == 0, result.output
    # LoRA r=8 on query, value of one layer with d=16: 2·(8·16 + 16·8) = 512; head 16·5 + 5 = 85
    assert "597" in result.stdout


PLAN = ["model.config.num_labels=5", "model.config.vocab_size=300"]


def test_plan_needs_no_data_and_no_cluster_that_exists(config: Path) -> None:
    """Four CPUs: four actors. Full fine-tuning sends 300·16 + ... numbers, 20 times those of the LoRA and more."""
    methods = "method=[{name: fedavg, adapter: full, label: full}, fedavg]"
    result = call("plan", "--no-data", config, *PLAN, methods, "--node", "CPU=4,memory=64GB")
    assert result.exit_code == 0, result.output
    assert "full /" in result.stdout
    assert all(part in result.stdout for part in ("weights", "activations", "offloaded", "actors"))
    last = result.stdout.split("what fits the cluster")[1]
    assert last.split("default")[1].split()[-2:] == ["4", "4"]


def test_plan_says_the_part_of_a_gpu(config: Path) -> None:
    """A tiny model on a GPU of 2.4 GB takes what CUDA does, 0.6 GB: a quarter, and a little. Three fit on each."""
    result = call("plan", "--no-data", config, *PLAN, "--gpu-memory", "2.4GB", "--node", "CPU=16,GPU=2")
    assert result.exit_code == 0, result.output
    amounts = result.stdout.split("what fits the cluster")[1].split("default")[1].split()
    assert 0.25 < float(amounts[1]) < 0.27
    assert amounts[-2:] == ["6", "6"]


def test_a_plan_without_readable_data_says_so(config: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = call("plan", config, *PLAN, "data={source: files, files: {train: nowhere.jsonl}}", "--node", "CPU=4")
    assert result.exit_code == 0, result.output
    assert "what fits the cluster" in result.stdout
    (warning,) = [record.getMessage() for record in caplog.records if "without the data" in record.getMessage()]
    assert "nowhere.jsonl" in warning


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--node", "CPU"], "cannot read 'CPU'"),
        (["--gpu-memory", "much"], "'much' is not an amount of memory"),
        (["--node", "CPU=4,GPU=1"], "--gpu-memory 24GB"),
        (["lora.rnk=4"], "did you mean 'rank'"),
    ],
)
def test_a_plan_that_cannot_be_made(config: Path, arguments: list[str], says: str) -> None:
    result = call("plan", "--no-data", config, *PLAN, *arguments)
    assert result.exit_code == 2, result.output
    assert says in result.stderr
    assert "Traceback" not in result.output


def test_the_version() -> None:
    result = call("--version")
    assert (result.exit_code, result.stdout) == (0, f"fedray {fedray.__version__}\n")


def test_methods_are_listed_and_described() -> None:
    result = call("methods")
    assert result.exit_code == 0, result.output
    assert all(f" {name} " in result.stdout for name in METHODS.names)
    result = call("methods", "fedalt")
    assert result.exit_code == 0, result.output
    assert "arXiv 2503.11880" in result.stdout
    for field in ("mixer", "adaptive | fixed | none", "a_init", "rest"):
        assert field in result.stdout
    refused = call("methods", "fedlat")
    assert refused.exit_code == 2
    assert "did you mean 'fedalt'" in refused.stderr
