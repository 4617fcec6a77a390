"""docs/extending.md: its files, in one folder, make one experiment; each is tried further beside what it extends."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from examples import EXAMPLES, PAGE, SHELL

import fedray
from fedray.config import load_config, parse_yaml


@pytest.fixture
def folder(own_folder: Path) -> Path:
    """The current folder, as the page's reader has made it."""
    for name, text in EXAMPLES.items():
        (own_folder / name).write_text(text, encoding="utf-8")
    subprocess.run(["sh", "-c", SHELL[0]], check=True)
    return own_folder


def test_the_page_has_one_file_of_each_kind() -> None:
    kinds = ["method", "variant", "source", "partition", "metric", "extraction", "rule"]
    kinds += ["optimizer", "kind", "engine", "callback", "tracker"]
    assert list(EXAMPLES) == [*(f"my_{kind}.py" for kind in kinds), "experiment.yaml"]


def test_its_short_configurations_are_valid(folder: Path) -> None:
    """Each is a change of the experiment; none names a class that is not on the page."""
    experiment = parse_yaml(EXAMPLES["experiment.yaml"], "experiment.yaml")
    short = [text for text in PAGE.split("```yaml\n")[1:] if not text.startswith("name:")]
    assert len(short) == 12
    for text in short:
        changed = parse_yaml(text.split("```")[0], "page")
        load_config({**experiment, **changed})


def check(folder: Path) -> None:
    """What the experiment leaves: all methods' rounds, the metric, the method's column, and what the callback and the
    tracker wrote."""
    result = fedray.RunResult.load(folder / "run")
    assert [(summary.method, summary.rounds) for summary in result.summaries] == [
        ("FedAvgM", 2),
        ("fedalt", 2),
        ("ffa_lora", 2),
        ("FedMedian", 2),
    ]
    assert {summary.metric_name for summary in result.summaries} == {"ErrorRate"}
    rounds = pd.DataFrame(result.rounds())
    assert (rounds.query("method == 'FedAvgM' and phase == 'train'")["speed"] > 0).all()
    assert len((folder / "clock.txt").read_text().splitlines()) == 4 * 3 + 1
    lines = [json.loads(line) for line in (folder / "progress.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "step" in line] == [1, 2, 2] * 4
    assert lines[0]["config"]["rounds"] == 2
    assert lines[-1]["status"] == "finished"


def test_they_run_together(folder: Path) -> None:
    fedray.run("experiment.yaml", runtime="inline", output="run")
    check(folder)


def test_they_run_together_on_ray(folder: Path, own_cluster: None) -> None:
    """The page's command, in a process of its own: workers import the files, too."""
    command = [str(Path(sys.executable).parent / "fedray"), *SHELL[-1].split()[1:]]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    check(folder)
