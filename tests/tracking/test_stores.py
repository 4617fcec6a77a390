"""The built-in trackers, read back from what they write without a network: a run, and its continuation."""

import json
from pathlib import Path
from typing import Any

import pytest
from calling import Calling
from tracked import tensorboard_scalars, tensorboard_texts, wandb_records

import fedray
from fedray.federation.events import MethodFinished
from fedray.results.run_result import RunResult
from fedray.types import round_number

ROUNDS = 2
"""Of the run; its continuation has one more."""
REPORT = "<!doctype html><p>a report</p>"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A run of two methods with every tracker, continued with another round, whose parameter `rounds` differs."""
    pytest.importorskip("wandb")
    pytest.importorskip("mlflow")
    from tiny import tiny_bert

    folder = tmp_path_factory.mktemp("stores")
    config = {
        "rounds": ROUNDS,
        "method": ["local", "fedavg"],
        "model": tiny_bert(max_position_embeddings=64),
        "data": {"source": "synthetic", "examples_per_client": 12, "max_length": 16},
        "partition": {"kind": "by_file"},
        "clients": {"count": 3},
        "evaluation": {"every": 2},
        "device": "cpu",
        "runtime": "inline",
        "tracking": [
            "tensorboard",
            {"name": "wandb", "mode": "offline", "project": "here"},
            {"name": "mlflow", "uri": f"file://{folder}/mlruns", "experiment": "there"},
        ],
    }
    fedray.run(config, output=folder / "run")
    report = Calling(
        lambda event: (folder / "run" / "report.html").write_text(REPORT) if type(event) is MethodFinished else None
    )
    return fedray.run(config, rounds=ROUNDS + 1, resume=folder / "run", callbacks=[report])


def expected(run: RunResult, column: str, name: str) -> list[tuple[str, int, float]]:
    """Return what a tracker must have of a column of rounds.parquet: (name, step, value), each once."""
    rows = run.rounds().query("phase == 'train'").dropna(subset=[column])
    return sorted((f"{row.method}/{name}", round_number(row.server_round), row[column]) for _, row in rows.iterrows())


COLUMNS = [
    ("personalised_mean", "personalised_accuracy"),
    ("uplink_bytes", "uplink_bytes"),
    ("simulated_seconds", "simulated_seconds"),
]


def finals(run: RunResult) -> dict[str, float | None]:
    return {f"{s.method}/final_personalised_accuracy": s.personalised_mean for s in run.summaries}


def test_tensorboard(run: RunResult) -> None:
    folder = run.path / "trackers" / "tensorboard"
    found = tensorboard_scalars(folder)
    for column, name in COLUMNS:
        mine = sorted(entry for entry in found if entry[0].partition("/")[2] == name)
        wanted = expected(run, column, name)
        assert [entry[:2] for entry in mine] == [entry[:2] for entry in wanted]
        assert [entry[2] for entry in mine] == pytest.approx([entry[2] for entry in wanted], rel=1e-6)  # float32
    last = {tag: value for tag, step, value in found if step == ROUNDS + 1}
    for name, value in finals(run).items():
        assert last[name] == pytest.approx(value, rel=1e-6)
    texts = tensorboard_texts(folder)
    assert "examples_per_client: 12" in texts["configuration"]
    assert texts["summary"].splitlines()[2].startswith("| local | ")


def test_wandb(run: RunResult) -> None:
    """Two files of one run: `wandb sync` joins them by its id, in the order of the steps, which go on."""
    records = wandb_records(run.path / "trackers")
    runs = [value for kind, value in records if kind == "run"]
    assert {(one.project, one.display_name) for one in runs} == {("here", "run")}
    assert len({one.run_id for one in runs}) == 1
    config = {update.key: json.loads(update.value_json) for update in runs[0].config.update}
    assert config["data"]["examples_per_client"] == 12
    history = [value for kind, value in records if kind == "history"]
    for column, name in COLUMNS:
        mine = [(k, line["round"], v) for line in history for k, v in line.items() if k.partition("/")[2] == name]
        assert sorted(mine) == expected(run, column, name)
    logged = {key: value for line in history for key, value in line.items()}
    assert {name: logged[name] for name in finals(run)} == finals(run)
    assert logged["summary/_type"] == "table-file"
    assert logged["report/_type"] == "html-file"
    assert [
        page.read_text() for page in run.path.glob("trackers/wandb/offline-run-*/files/media/html/report*.html")
    ] == [REPORT]
    steps = [line["_step"] for line in history]
    assert steps == sorted(steps)
    assert [value.exit_code for kind, value in records if kind == "exit"] == [0, 0]


def test_mlflow(run: RunResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"file://{run.path.parent}/mlruns")
    experiment = client.get_experiment_by_name("there")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == ("run", "FINISHED")
    assert found.data.params["data.examples_per_client"] == "12"
    assert found.data.params["rounds"] == str(ROUNDS), "a parameter of MLflow cannot change"
    for column, name in COLUMNS:
        wanted = expected(run, column, name)
        mine = {key: client.get_metric_history(found.info.run_id, key) for key in {entry[0] for entry in wanted}}
        assert sorted((key, m.step, m.value) for key, history in mine.items() for m in history) == wanted
    assert {name: found.data.metrics[name] for name in finals(run)} == finals(run)
    folder = Path(found.info.artifact_uri.removeprefix("file://"))
    assert (folder / "report.html").read_text() == REPORT
    assert f"rounds: {ROUNDS + 1}" in (folder / "config.yaml").read_text()
    table: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    assert table["data"][0][table["columns"].index("method")] == "local"
