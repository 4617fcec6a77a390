"""fedray compare as a user meets it: real runs and a sweep, every format, and what is refused."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from tiny import tiny_bert
from typer.testing import CliRunner

import fedray
from fedray.cli.app import app
from fedray.config import load_sweep
from fedray.results.run_result import RunResult
from fedray.storage.paths import StoragePath
from fedray.sweeps.page import result_report
from fedray.sweeps.result import SweepResult, TrialResult, begin
from fedray.sweeps.space import trials_of

BASE: dict[str, Any] = {
    "name": "small",
    "rounds": 1,
    "method": ["local", "fedavg"],
    "model": tiny_bert(max_position_embeddings=64),
    "data": {"source": "synthetic", "examples_per_client": 16, "max_length": 16},
    "partition": {"kind": "by_file"},
    "clients": {"count": 3},
    "train": {"lr": 1e-2},
    "device": "cpu",
    "runtime": "inline",
}


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "100"})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders 0 and 1 of runs with two seeds, `more` of seed 0 with another method, and `other` of other data."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        fedray.run(BASE, seed=seed, output=folder / str(seed))
    fedray.run(BASE, method=["local", "fedalt"], output=folder / "more")
    fedray.run(BASE, method="fedalt", data={"examples_per_client": 20}, output=folder / "other")
    return folder


def test_two_seeds_are_compared(runs: Path) -> None:
    ended = call("compare", runs / "0", runs / "1")
    assert ended.exit_code == 0, ended.output
    assert (
        "small: accuracy in %, personalised; 2 seeds (0, 1), 3 clients with 4 test examples on average" in ended.stdout
    )
    assert "small: differences to local, client by client" in ended.stdout
    assert "differences to fedavg" in ended.stdout
    assert "2 seeds: the smallest p of the sign-flip test is 0.5" in ended.stdout


def test_figures_are_those_of_the_runs_clients(runs: Path) -> None:
    """Δ and the wins of fedavg over local, from the tables of both runs."""
    found = fedray.compare(runs / "0", runs / "1", reference="local")
    by_seed = []
    for seed in ("0", "1"):
        table = RunResult.load(runs / seed).clients().query("phase == 'final'")
        by_seed.append(table.pivot(index="client", columns="method", values="personalised_metric"))
    differences = pd.concat([table.fedavg - table.local for table in by_seed])
    assert len(differences) == 6
    row = found.to_pandas().set_index("method").loc["fedavg"]
    assert row.delta == pytest.approx(differences.mean())
    assert row.win == pytest.approx((differences > 0).mean())
    assert row["mean"] == pytest.approx(pd.concat([table.fedavg for table in by_seed]).mean())


def test_runs_with_one_seed_are_merged(runs: Path) -> None:
    """`local` is in both with the same bits, and counts once."""
    ended = call("compare", runs / "0", runs / "more", "--reference", "fedalt", "--moment", "aggregated")
    assert ended.exit_code == 0, ended.output
    assert "accuracy in %, aggregated; 1 seed (0)" in ended.stdout
    assert "differences to fedalt" in ended.stdout
    assert "clients only" in ended.stdout
    assert "hurt by" not in ended.stdout


def test_a_further_metric(tmp_path: Path) -> None:
    """Its scores are those of evaluations.parquet; the first metric's are the same there and in clients.parquet."""
    run = fedray.run(BASE, evaluation={"metrics": ["macro_f1", "accuracy"]}, output=tmp_path / "a")
    table = run.evaluations().query("phase == 'final' and moment == 'personalised' and examples == 'test'")
    for metric in ("macro_f1", "accuracy"):
        means = table[table.metric == metric].groupby("method").value.mean()
        found = fedray.compare(tmp_path / "a", metric=metric)
        assert found.metric.label == metric
        assert found.to_pandas().groupby("method")["mean"].first().to_dict() == pytest.approx(means.to_dict())
    ended = call("compare", tmp_path / "a", "--metric", "acuracy")
    assert ended.exit_code == 2
    assert "metric: no 'acuracy' (did you mean 'accuracy'?); small has macro_f1, accuracy" in ended.stderr
    assert "accuracy in %" in call("compare", tmp_path / "a", "--metric", "accuracy").stdout


@pytest.mark.parametrize(
    ("name", "begins"),
    [
        ("table.txt", "small: accuracy in %"),
        ("table.md", "**small: accuracy in %"),
        ("table.tex", "% small: accuracy in %"),
        ("table.csv", "data_set,seeds,method,mean,"),
    ],
)
def test_formats(runs: Path, tmp_path: Path, name: str, begins: str) -> None:
    ended = call("compare", runs / "0", "--to", tmp_path / name)
    assert ended.exit_code == 0, ended.output
    assert (tmp_path / name).read_text().startswith(begins)
    chosen = {"txt": "table", "md": "markdown", "tex": "latex", "csv": "csv"}[name.rpartition(".")[2]]
    assert begins in call("compare", runs / "0", "--format", chosen).stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["0", "--reference", "lcal"], "reference: no method 'lcal' (did you mean 'local'?); small has local, fedavg"),
        (["0", "other"], "different data"),
        (["other"], "only fedalt has finished; a comparison needs several methods"),
        (["0", "1", "more"], "fedalt lacks seed 1"),
        (["0", "--method", "local"], "only local has finished"),
        (["0", "--to", "x.pdf"], "--to x.pdf: no format has the suffix '.pdf'; name one with --format"),
        (["nowhere"], "nowhere: is not the folder of a run (with config.yaml) or of a sweep (with sweep.yaml)"),
        (["."], "it contains runs, which can be named: 0, 1, more, other"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    runs: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(runs)
    ended = call("compare", *arguments)
    assert ended.exit_code == 2
    assert says in ended.stderr
    assert ended.stderr.startswith("error: ")


def test_a_run_of_several_methods_ends_with_its_differences(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(BASE))
    ended = call("run", tmp_path / "config.yaml", "--output", tmp_path / "a")
    assert ended.exit_code == 0, ended.output
    assert "Δ to local" in ended.stdout
    alone = call("run", tmp_path / "config.yaml", "method=local", "--output", tmp_path / "b")
    assert "Δ to" not in alone.stdout
    assert "comparison" not in alone.stdout
    unlike = call(
        "run",
        tmp_path / "config.yaml",
        "method=[local, {name: fedavg, train: {epochs: 2}}]",
        "--output",
        tmp_path / "c",
    )
    assert unlike.exit_code == 0
    assert "not comparable: different budgets" in unlike.stdout


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    """Two methods with two learning rates and two seeds, and one trial of fedavg that has failed."""
    place = StoragePath.of(tmp_path_factory.mktemp("sweep"))
    space = {"method": ["local", "fedavg"], "train.lr": [1e-3, 1e-2], "seed": [0, 1]}
    given = load_sweep({"base": BASE, "space": space})
    found = SweepResult(place, given, trials_of(given), {})
    begin(found)
    for trial in found.trials:
        if trial.id == "0006":
            found = found.with_result(TrialResult(trial.id, "failed", error="a fault"))
            continue
        ended = fedray.run(trial.config, output=found.folder(trial).local).summaries[0]
        metrics = {"personalised_mean": ended.personalised_mean}
        found = found.with_result(TrialResult(trial.id, "finished", 1, metrics))
    found.write()
    return found


def test_a_sweep_gives_the_runs_of_each_methods_best_point(sweep: SweepResult) -> None:
    """Of fedavg the point whose seeds have all finished."""
    table = sweep.over_seeds()
    lr = table[table.method == "local"]["train.lr"].iloc[0]
    found = [(run.summaries[0].method, run.config.train.lr, run.config.seed) for run in sweep.runs()]
    assert found == [("local", lr, 0), ("local", lr, 1), ("fedavg", 1e-3, 0), ("fedavg", 1e-3, 1)]


def test_a_sweep_is_compared(sweep: SweepResult) -> None:
    ended = call("compare", sweep.place)
    assert ended.exit_code == 0, ended.output
    assert "2 seeds (0, 1)" in ended.stdout
    note = f"{sweep.place}: each method at its best of train.lr by {sweep.sweep.selects_by}"
    assert note in " ".join(ended.stdout.split())
    assert sweep.compare().to_pandas().equals(fedray.compare(sweep.place).to_pandas())
    assert sweep.compare(reference="fedavg").references == ("fedavg",)


def test_the_report_of_a_sweep(sweep: SweepResult, tmp_path: Path) -> None:
    """Its points, the metric by the field that varies, the trial that failed, and the methods at their best points."""
    ended = call("report", sweep.place, "--output", tmp_path / "page.html")
    assert ended.exit_code == 0, ended.output
    html = (tmp_path / "page.html").read_text("utf-8")
    assert "8 trials: 7 finished, 1 failed." in html
    assert "a fault" in html
    assert 'data-figure="sweep-train-lr"' in html
    assert "2 seeds (0, 1)" in html
    points = next(section for section in result_report([sweep]).sections if section.title == "Sweep sweep")
    (sheet,) = points.sheets
    table = sweep.over_seeds()
    assert [row[0].text for row in sheet.rows] == table["method"].tolist()
    (card,) = points.cards
    frame = card.views[""].marks.frame()
    for method, rows in frame.groupby("name"):
        mine = table[table.method == method].sort_values("train.lr")
        assert rows["x"].tolist() == mine["train.lr"].tolist()
        assert rows["y"].tolist() == pytest.approx((100 * mine["mean"]).tolist())
