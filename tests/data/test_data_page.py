"""The examples of docs/data.md run as they stand."""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from examples import DOCS, examples_of
from typer.testing import CliRunner

import fedray
from fedray.cli.app import app
from fedray.config import load_config
from fedray.data.examples import Examples, assemble
from fedray.data.formats.instructions import FORMATS as INSTRUCTIONS
from fedray.data.reading.readers import COMPRESSED, FORMATS

PAGE = (DOCS / "data.md").read_text(encoding="utf-8")
FILES = examples_of(PAGE)
CONFIGS = [name for name in FILES if name.endswith(".yaml")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with all files of the page."""
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def examples(config: str, **data: Any) -> Examples:
    found = load_config(config, {f"data.{name}": value for name, value in data.items()})
    return assemble(list(found.data.load(found.task, 0, None)), found.data, found.task)


@pytest.mark.parametrize(
    ("config", "clients"),
    [
        ("reviews.yaml", ["Aix-en-Provence", "北京"]),
        ("recipes.yaml", ["client_000", "client_001"]),
        ("quiz.yaml", ["client_000", "client_001"]),
        ("shops.yaml", ["north", "south"]),
        ("answers.yaml", ["Bo", "Zoë"]),
        ("households.yaml", ["north 3", "south 1"]),
        ("mixture.yaml", ["answers", "recipes"]),
        ("chats.yaml", ["food", "sums"]),
    ],
)
def test_an_experiment_of_the_page_is_valid(folder: Path, config: str, clients: list[str]) -> None:
    ended = CliRunner().invoke(app, ["validate", config, f"data.cache_dir={folder}/cache"])
    assert ended.exit_code == 0, ended.output
    assert all(f" {client} " in ended.output for client in clients)
    assert "the experiment is valid" in ended.output


COMMANDS = re.findall(r"^fedray validate (chats\.yaml .*)", PAGE, re.MULTILINE)


@pytest.mark.parametrize("words", COMMANDS)
def test_instruction_data_in_every_format(folder: Path, words: str) -> None:
    ended = CliRunner().invoke(app, ["validate", *words.split(), f"data.cache_dir={folder}/cache", "--show", "1"])
    assert ended.exit_code == 0, ended.output
    assert " of them learned" in ended.output


def test_every_format_is_on_the_page() -> None:
    assert len(COMMANDS) == 4
    assert all(f"| `{name}` |" in PAGE for name in INSTRUCTIONS)


def test_every_experiment_of_the_page_is_tried() -> None:
    (tried,) = [mark for mark in test_an_experiment_of_the_page_is_valid.pytestmark if mark.name == "parametrize"]
    assert sorted(CONFIGS) == sorted(config for config, _ in tried.args[1])


def test_the_first_experiment_runs(folder: Path) -> None:
    found = fedray.run("reviews.yaml", output=folder / "run", **{"data.cache_dir": str(folder / "cache")})
    assert set(found.clients().client) == {"北京", "Aix-en-Provence"}


def test_the_forms_of_the_table_are_read_alike(folder: Path) -> None:
    runpy.run_path("forms.py")
    expected = examples("reviews.yaml")
    others = [path.name for path in folder.glob("reviews.*") if path.name not in ("reviews.csv", "reviews.yaml")]
    assert len(others) == 5
    for name in others:
        found = examples("reviews.yaml", files={"train": name})
        assert found.label_names == expected.label_names == ("0", "1", "2")
        assert found.table.select(["text", "label"]) == expected.table.select(["text", "label"])
        assert found.values("city").tolist() == expected.values("city").tolist()


def test_the_prompts_of_the_page(folder: Path) -> None:
    """With and without an input: the heading goes with its text."""
    prompts = examples("recipes.yaml").table["prompt"].to_pylist()
    assert prompts[2] == "Make it vegan.\n\n### Input:\nbutter\n\n### Response:\n"
    assert prompts[:2] == ["Name a soup.\n\n### Response:\n", "Name a spice.\n\n### Response:\n"]


def test_the_page_names_all_formats() -> None:
    assert all(f"`{suffix}`" in PAGE for suffix in FORMATS)
    assert all(f"{suffix}`" in PAGE for suffix in COMPRESSED)
