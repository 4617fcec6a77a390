"""The commands of the pages run as they stand, in a folder in which small experiments have the names that they use.

Not here: what needs a cluster of its own (clusters.md, `fedray submit`), data that a reader downloads (kits.md,
papers.md), hours (the tables of methods.md) or a GPU, and the pages whose own tests run them: data.md, extending.md,
statistics.md.
"""

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from pages import BLOCK, ROOT, command_lines
from tiny import tiny_bert
from typer.testing import CliRunner

from fedray.cli.app import app

NEEDED = {
    "README.md": (),
    "experiments.md": (),
    "export.md": ("runs/mine",),
    "index.md": (),
    "memory.md": (),
    "report.md": (),
    "results.md": ("runs/NAME-TIME",),
    "sweeps.md": (),
}
"""By page, the runs that its commands expect."""

SMALL: dict[str, Any] = {
    "name": "quickstart",
    "rounds": 2,
    "method": ["local", "fedavg", "fedreft", "fedalt"],
    "model": tiny_bert(),
    "partition": {"kind": "dirichlet", "alpha": 1.0},
    "clients": {"count": 4},
    "lora": {"rank": 2},
    "train": {"max_steps": 2},
    "report": True,
    "runtime": "inline",
    "device": "cpu",
}


def commands(page: str) -> Iterator[list[str]]:
    """Yield the page's commands of fedray that one machine and these files are enough for."""
    text = (ROOT / page if page == "README.md" else ROOT / "docs" / page).read_text("utf-8")
    for match in BLOCK.finditer(text):
        for program, *words in command_lines(match[2]) if match[1] == "sh" else ():
            if (program, words) == ("make", ["quickstart"]):
                yield ["run", "jobs/quickstart.yaml"]
            elif program == "fedray" and words[0] != "submit":
                yield words


@pytest.fixture
def place(own_folder: Path) -> Path:
    """The folder of a reader who has small files instead of the project's."""
    (own_folder / "jobs").mkdir()
    texts = [f"{colour} {number}" for number in range(30) for colour in ("green", "white", "blue")]
    table = pd.DataFrame({"text": texts, "label": [text.split()[0] for text in texts]})
    table.to_csv("texts.csv", index=False)
    table.head(20).to_json("new.jsonl", orient="records", lines=True)
    small = {**SMALL, "data": {"source": "files", "files": {"train": str(own_folder / "texts.csv")}, "max_length": 24}}
    tiers = {"clients": {"tiers": {"strong": {"share": 0.5}, "weak": {"share": 0.5, "mask_ratio": 0.5}}, "count": 4}}
    sweep = yaml.safe_load((ROOT / "jobs" / "sweep.yaml").read_text("utf-8"))
    del sweep["space"]["data.max_per_client"]
    space = {**sweep["space"], "method": ["local", "fedavg"]}
    small_sweep = {**sweep, "base": {**small, "runtime": "ray"}, "space": space}
    for name, content in {
        "jobs/quickstart.yaml": small,
        "jobs/three_tiers.yaml": {**small, **tiers},
        "jobs/sweep.yaml": small_sweep,
        "config.yaml": small,
    }.items():
        Path(name).write_text(yaml.safe_dump(content))
    return own_folder


def run(words: list[str]) -> None:
    expanded = [name for word in words for name in (sorted(glob.glob(word)) if "*" in word else [word])]
    ended = CliRunner().invoke(app, expanded, env={"COLUMNS": "140"})
    assert ended.exit_code == 0, f"{' '.join(words)}\n{ended.output}\n{ended.exception!r}"


@pytest.mark.slow
@pytest.mark.parametrize("page", NEEDED)
def test_commands_run(page: str, place: Path, cluster: None) -> None:
    for folder in NEEDED[page]:
        run(["run", "config.yaml", "--output", folder])
    for words in commands(page):
        run(words)
