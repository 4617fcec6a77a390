"""The Python blocks of the pages that have no test of their own run as they stand, in a folder with what they read."""

import json
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from pages import BLOCK, PAGES, ROOT, command_lines
from tiny import TINY_LLAMA, tiny_bert
from typer.testing import CliRunner

import fedray
from fedray.cli.app import app

ELSEWHERE = {"data.md", "extending.md", "python.md", "statistics.md"}
"""Pages whose blocks other tests run; of extending.md, all but the calls of `local.train`."""
LETTERS = ["no", "yes", "perhaps", "never"]


def blocks_of(page: Path) -> list[str]:
    return [match[2] for match in BLOCK.finditer(page.read_text("utf-8")) if match[1] == "python"]


def experiment(**fields: Any) -> dict[str, Any]:
    return {
        "runtime": "inline",
        "device": "cpu",
        "rounds": 1,
        "seed": 3,
        "method": ["fedavg", "fedreft", "fedalt"],
        "task": "causal_lm",
        "model": {"path": "random", "tokenizer": "bytes", "config": TINY_LLAMA},
        "data": {"source": "synthetic", "examples_per_client": 12, "max_length": 48},
        "partition": {"kind": "by_file"},
        "clients": {"count": 4},
        "train": {"max_steps": 2, "batch_size": 4},
        "lora": {"rank": 2, "targets": ["q_proj", "v_proj"]},
        "evaluation": {"examples": True},
        **fields,
    }


def of_the_harness(folder: Path) -> None:
    """Three data sets of lm-evaluation-harness as their repositories on the hub hold them, with a few rows each."""
    boolq = [{"passage": f"{a} is {b}.", "question": f"is {a} {b}", "label": n % 2} for n, (a, b) in enumerate(PAIRS)]
    arc = [
        {"question": a, "choices": {"text": LETTERS, "label": list("ABCD")}, "answerKey": "ABCD"[n % 4]}
        for n, (a, _) in enumerate(PAIRS)
    ]
    book = [{**row, "question_stem": row["question"]} for row in arc]
    for name, config, rows in (
        ("aps/super_glue", "boolq", boolq),
        ("allenai/ai2_arc", "ARC-Easy", arc),
        ("allenai/openbookqa", "main", book),
    ):
        place = folder / name / config
        place.mkdir(parents=True)
        files = []
        for split in ("train", "validation", "test"):
            (place / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
            files.append({"split": split, "path": f"{config}/{split}.jsonl"})
        card = yaml.safe_dump({"configs": [{"config_name": config, "data_files": files}]})
        (folder / name / "README.md").write_text(f"---\n{card}---\n")


PAIRS = [("salt", "white"), ("coal", "black"), ("grass", "green"), ("the sky", "blue")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the blocks name: the quickstart (a smaller one), runs, and the harness's data."""
    place: Path = tmp_path_factory.mktemp("pages")
    (place / "jobs").mkdir()
    quickstart = experiment(method="local", task="classification", model=tiny_bert(), evaluation={})
    quickstart["lora"] = {"rank": 2}
    (place / "jobs" / "quickstart.yaml").write_text(yaml.safe_dump(quickstart | {"storage_path": "runs"}))
    fedray.run(experiment(), output=place / "runs" / "RUN")
    (place / "runs" / "mine").symlink_to("RUN")
    fedray.run(
        experiment(
            method=["fedavg", "flexlora"],
            partition={"kind": "by_file", "validation_fraction": 0, "test_fraction": 0},
            data={"source": "files", "files": {"a": common(place), "b": common(place)}, "max_length": 48},
            clients={},
            evaluation={"metrics": ["perplexity"], "common": ["server"]},
        ),
        output=place / "runs" / "k11_twin",
    )
    of_the_harness(place)
    return place


def common(place: Path) -> dict[str, str]:
    rows = pd.DataFrame({"prompt": [a for a, _ in PAIRS] * 4, "answer": [b for _, b in PAIRS] * 4})
    rows.to_csv(place / "rows.csv", index=False)
    return {"train": str(place / "rows.csv"), "common": str(place / "rows.csv")}


def test_all_pages_with_python_are_run() -> None:
    pages = {page.name for page in PAGES if blocks_of(page)}
    assert pages == ELSEWHERE | set(EXPECTED)


def of_evaluation(found: dict[str, Any]) -> None:
    assert set(found["result"].to_pandas()["task"]) == {"boolq", "arc_easy"}


def of_two_rounds(found: dict[str, Any]) -> None:
    assert list(found["result"].to_pandas()["method"]) == ["local", "fedalt"]


def of_export(found: dict[str, Any]) -> None:
    assert not found["model"].training


def of_kits(found: dict[str, Any]) -> None:
    assert set(found["scores"]["group"]) >= {"a", "b"}


EXPECTED: dict[str, Callable[[dict[str, Any]], None]] = {
    "evaluation.md": of_evaluation,
    "experiments.md": of_two_rounds,
    "README.md": of_two_rounds,
    "export.md": of_export,
    "kits.md": of_kits,
}
"""By page, what its names hold when all its blocks have run."""


@pytest.mark.parametrize("name", EXPECTED)
def test_the_blocks_run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (page,) = [page for page in PAGES if page.name == name and blocks_of(page)]
    if "lm_eval" in "".join(blocks_of(page)):
        pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"fedray": fedray}
    for block in blocks_of(page):
        exec(compile(block, name, "exec"), names)
    EXPECTED[name](names)


def test_the_command_of_the_harness_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The only one of evaluation.md that needs nothing from elsewhere."""
    pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
    monkeypatch.chdir(folder)
    shells = [m[2] for m in BLOCK.finditer((ROOT / "docs" / "evaluation.md").read_text("utf-8")) if m[1] == "sh"]
    (_, *words), *_ = command_lines(shells[0])
    ended = CliRunner().invoke(app, words)
    assert ended.exit_code == 0, ended.output
    assert "openbookqa" in (folder / "harness.json").read_text("utf-8")


METHOD = """
from dataclasses import dataclass

from fedray.methods.fedavg import FedAvg
from fedray.training.steering import Proximal

CALLS = []

@dataclass(frozen=True)
class Calls(FedAvg):
    def train_client(self, adapter, client_state, downlink, local):
        anchor = adapter.read("lora")
        BLOCK
        CALLS.append(mean.shape == anchor.shape)
        return super().train_client(adapter, client_state, downlink, local)
"""


def test_the_calls_of_training_run(own_folder: Path) -> None:
    (block,) = [text for text in blocks_of(ROOT / "docs" / "extending.md") if text.startswith("local.train")]
    (own_folder / "my_calls.py").write_text(METHOD.replace("BLOCK", textwrap.indent(block, " " * 8).strip()))
    method = {"class": "my_calls.Calls"}
    fedray.run(experiment(method=method, task="classification", model=tiny_bert(), lora={"rank": 2}, evaluation={}))
    assert sys.modules["my_calls"].CALLS.count(True) >= 4
