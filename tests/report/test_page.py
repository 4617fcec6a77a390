"""The report as a user meets it: what a run writes at its end, in a real browser, as files, and before training."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import pytest
import yaml
from browser import opened
from large_run import large_run
from reported import REPORTED
from typer.testing import CliRunner

import fedray
from fedray.cli.app import app
from fedray.federation.events import Callback, MethodFinished
from fedray.report.build import report_of
from fedray.report.matplotlib_drawing import write_figures
from fedray.report.page import page
from fedray.report.plotly_drawing import drawing
from fedray.results.run_result import RunResult
from fedray.storage.paths import StoragePath

LIMIT = 3_000_000
"""Bytes of a page at most."""

CLICKS = """<script>
const waiting = setInterval(() => {
  if (!document.documentElement.dataset.state) return;
  clearInterval(waiting);
  for (const button of document.querySelectorAll(".views button")) button.click();
  for (const head of document.querySelectorAll("th[data-sort]")) head.click();
  setTimeout(() => { document.documentElement.dataset.clicked = "all"; }, 3000);
}, 100);
</script></body>"""
"""Shows every view of every figure and sorts every table, as a reader may."""


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "100"})


def clicked(html: Path, folder: Path) -> Path:
    """Return a copy of a page in which everything is clicked."""
    copy = folder / "clicked.html"
    copy.write_text(html.read_text("utf-8").replace("</body>", CLICKS), "utf-8")
    return copy


def test_a_run_writes_a_page_that_a_browser_shows_without_a_network(place: Path, tmp_path: Path) -> None:
    """Every figure is drawn once all views have been shown; the console stays empty, and nothing is requested."""
    html = place / "report.html"
    assert html.stat().st_size < LIMIT
    found = opened(clicked(html, tmp_path), tmp_path, width=600, dark=True)
    assert found.state == "ready", found.console
    assert found.console == ()
    assert found.requested == ()
    figures = list(report_of([RunResult.load(place)]).figures())
    assert len(figures) > 20
    assert 'data-clicked="all"' in found.dom
    assert len(re.findall('class="[^"]*svg-container', found.dom)) == len(figures)
    for words in ("λ of FedReFT", "Mixer weights of FedALT", "Memberships in clusters", "Stragglers", "95 % interval"):
        assert words in found.dom


def test_the_browser_helper_sees_errors_and_requests(tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text('<html><script>fetch("https://example.com/x.js").catch(() => 0); missing();</script></html>')
    found = opened(bad, tmp_path)
    assert "missing is not defined" in found.console[0]
    assert found.requested == ("https://example.com/x.js",)


def test_plotly_knows_every_attribute_of_the_figures(finished: RunResult) -> None:
    for figure in report_of([finished]).figures():
        drawn = drawing(figure)
        go.Figure(drawn["data"], drawn["layout"])
        assert drawn["layout"]["xaxis"]["title"]["text"]
        assert drawn["layout"]["yaxis"]["title"]["text"]


def test_text_of_a_run_cannot_become_markup(finished: RunResult) -> None:
    html = page(report_of([finished], "<script>alert(1)</script>"))
    assert "<script>alert(1)" not in html
    assert "&lt;script&gt;alert(1)" in html


def test_figures_as_files(finished: RunResult, tmp_path: Path) -> None:
    """One of each kind, twice: the second report overwrites the first one's figures."""
    figures = list(report_of([finished]).figures())
    chosen = list({type(figure.marks): figure for figure in figures}.values())
    assert len(chosen) == 5
    chosen += [figure for figure in figures if figure.key == "recorded-lam"]
    folder = tmp_path / "figures"
    for _ in range(2):
        write_figures(chosen, StoragePath.of(folder))
    assert list(json.loads((folder / "figures.json").read_text())) == [figure.key for figure in chosen]
    for figure in chosen:
        assert "<svg" in (folder / f"{figure.key}.svg").read_text()
        assert (folder / f"{figure.key}.png").read_bytes().startswith(b"\x89PNG")
        assert len(pd.read_csv(folder / f"{figure.key}.csv"))
    lam = pd.read_csv(folder / "recorded-lam.csv")
    rows = finished.clients().query("method == 'fedreft' and server_round == 1")
    assert lam.loc[lam.x == 2, "y"].item() == pytest.approx(rows["lam"].median())


@pytest.mark.parametrize(
    ("option", "name", "says"),
    [
        ("--output", "notes.txt", "exists and is not a report; name another file with --output"),
        ("--output", "folder", "is a folder; name a file, such as"),
        ("--figures", "notes.txt", "is a file; name a folder"),
        ("--figures", "folder", "is not empty, and has no figures of a report; name another folder"),
    ],
)
def test_nothing_but_a_report_is_overwritten(place: Path, tmp_path: Path, option: str, name: str, says: str) -> None:
    (tmp_path / "folder").mkdir()
    for file in ("notes.txt", "folder/thesis.svg"):
        (tmp_path / file).write_text("mine")
    options = {"--output": tmp_path / "page.html"} | {option: tmp_path / name}
    ended = call("report", place, *[word for pair in options.items() for word in pair])
    assert ended.exit_code == 2
    assert says in ended.stderr
    assert (tmp_path / "notes.txt").read_text() == (tmp_path / "folder" / "thesis.svg").read_text() == "mine"
    assert not (tmp_path / "page.html").exists()


def test_bad_folders_are_named(place: Path, tmp_path: Path) -> None:
    ended = call("report", tmp_path)
    assert ended.exit_code == 2
    assert "is not the folder of a run (with config.yaml) or of a sweep" in ended.stderr
    ended = call("report", place, place)
    assert "--output: the report of several results is in none of their folders; name a file" in ended.stderr


class Occupies(Callback):
    """Puts a file of another kind where the report belongs."""

    def __init__(self, file: Path):
        self.file = file

    def on_method_finished(self, event: MethodFinished) -> None:
        self.file.write_text("mine")


def test_a_report_that_fails_does_not_fail_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = REPORTED | {"method": "local", "rounds": 1, "evaluation": {}}
    file = tmp_path / "run" / "report.html"
    result = fedray.run(config, output=tmp_path / "run", callbacks=[Occupies(file)])
    assert result["local"].rounds == 1
    assert file.read_text() == "mine"
    assert "the report could not be written, but the results are complete" in caplog.text
    assert "report.html: exists and is not a report" in caplog.text
    file.unlink()
    (tmp_path / "run" / "clients.parquet").write_bytes(b"broken")
    ended = call("report", tmp_path / "run")
    assert ended.exit_code == 1
    assert "clients.parquet: cannot be read" in ended.stderr


def test_a_run_of_an_earlier_version(tmp_path: Path) -> None:
    """It has neither partition.parquet nor versions.json, and says so."""
    former = Path(__file__).parents[1] / "experiment" / "format_1"
    html = page(report_of([RunResult.load(former)]))
    assert "no partition.parquet" in html
    assert "the run recorded none" in html


def test_a_run_without_any_score(tmp_path: Path) -> None:
    """Its clients have no test examples; what cannot be drawn is left out with a sentence."""
    data = {"source": "synthetic", "examples_per_client": 8, "max_length": 16}
    fields = {"data": data, "partition": {"kind": "by_file", "test_fraction": 0}, "evaluation": {}, "rounds": 1}
    fedray.run(REPORTED | fields | {"method": ["local", "fedavg"]}, output=tmp_path / "run")
    html = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "No client has a score: the final pass had no test examples." in html
    assert "Training loss" in html


def test_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`fedray validate --report` draws classes and tasks, and what each method will cost."""
    monkeypatch.chdir(tmp_path)
    lines = [{"text": f"line {i}", "label": "ab"[i % 2]} for i in range(40)]
    Path("lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    part = {"source": "files", "files": {"train": "lines.jsonl"}}
    data = {"source": "several", "max_length": 16, "parts": {"first": part, "second": part}}
    config = REPORTED | {"data": data, "partition": {"kind": "mixed_task"}}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    ended = call("validate", "config.yaml", "--report", "--figures", "figures")
    assert ended.exit_code == 0, ended.output
    assert "tiny-data.html" in ended.stdout
    html = Path("tiny-data.html").read_text("utf-8")
    assert "Clients and classes" in html
    assert "Clients and tasks" in html
    assert "Predicted memory" in html
    tasks = pd.read_csv("figures/partition-task-train.csv").set_index("name").fillna(0)
    classes = pd.read_csv("figures/partition-class-train.csv").set_index("name").fillna(0)
    assert tasks.sum(axis=1).to_dict() == classes.sum(axis=1).to_dict(), "both count each client's training examples"
    ended = call("validate", "config.yaml", "--figures", "others")
    assert ended.exit_code == 2
    assert "--figures: only with --report" in ended.stderr


def test_the_partition_and_the_versions_of_a_run(finished: RunResult) -> None:
    table = pd.read_parquet(finished.path / "partition.parquet")
    every, classes = table.query("kind == 'all'"), table.query("kind == 'class'")
    keys = ["client", "split"]
    assert every.set_index(keys)["examples"].to_dict() == classes.groupby(keys)["examples"].sum().to_dict()
    trained = finished.clients().query("phase == 'final' and method == 'local'").set_index("client")["num_examples"]
    assert every.query("split == 'train'").set_index("client")["examples"].to_dict() == trained.to_dict()
    (versions,) = json.loads((finished.path / "versions.json").read_text())
    assert {"python", "torch", "transformers", "peft"} <= set(versions)


def test_importing_fedray_and_its_actors_imports_neither_plotly_nor_matplotlib() -> None:
    code = "import sys, fedray.api, fedray.runtime.client_actor; print({'plotly', 'matplotlib'} & set(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=True)
    assert ended.stdout.strip().splitlines()[-1] == "set()", ended.stdout


@pytest.mark.slow
def test_fifty_methods_with_a_hundred_rounds_and_a_thousand_clients_stay_below_the_limit(tmp_path: Path) -> None:
    run = large_run(tmp_path / "run", 50, 100, 1000)
    fedray.write_report(run)
    html = run.path / "report.html"
    assert html.stat().st_size < LIMIT
    found = opened(html, tmp_path)
    assert found.state == "ready"
    assert found.console == ()
