"""Every code block of every page: commands are understood, configurations are valid, Python's imports are found.

Those of Python also run, and commands: test_python_blocks.py and test_commands.py run them, or say which test does.
"""

import ast
import doctest
import importlib
import json
import re
from pathlib import Path
from typing import Any

import click
import pytest
from examples import EXAMPLES
from pages import BLOCK, PAGES, ROOT, command_lines
from small_config import SMALLEST
from typer.main import get_command

from fedray.cli.app import app
from fedray.config import load_config, load_sweep, parse_yaml
from fedray.methods.registry import build_method
from fedray.sweeps.space import trials_of


def blocks(language: str) -> list[Any]:
    """Return the blocks of all pages, as parameters of a test."""
    found = []
    for page in PAGES:
        text = page.read_text("utf-8")
        for match in BLOCK.finditer(text):
            if match[1] == language:
                line = text.count("\n", 0, match.start()) + 2
                found.append(pytest.param(match[2], id=f"{page.relative_to(ROOT)}:{line}"))
    return found


def test_every_language_is_tested() -> None:
    """Drawings and tables have no language; data.md's own test reads its CSV and its card of a data set."""
    languages = {match[1] for page in PAGES for match in BLOCK.finditer(page.read_text("utf-8"))}
    assert languages == {"", "sh", "yaml", "python", "json", "csv", "markdown"}


def understood(words: list[str]) -> dict[str, Any]:
    """Return the values that a command of fedray receives, by name; nothing is run."""
    command: click.Command = get_command(app)
    context = click.Context(command, info_name="fedray")
    while hasattr(command, "resolve_command"):
        name, command, words = command.resolve_command(context, words)
        context = click.Context(command, parent=context, info_name=name)
    return command.make_context(context.info_name, words, parent=context.parent).params


@pytest.mark.parametrize(
    "words", [["run"], ["run", "x.yaml", "--ouptut", "y"], ["compare", "x", "--format", "word"], ["jobs", "lst"]]
)
def test_what_fedray_does_not_understand(words: list[str]) -> None:
    with pytest.raises(Exception, match="Missing parameter|No such|is not one of"):
        understood(words)


@pytest.mark.parametrize("block", blocks("sh"))
def test_commands_are_understood(block: str) -> None:
    """Each names a subcommand and options that there are, and files that there are."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    for program, *words in command_lines(block):
        if program == "fedray":
            assert understood(words), words
        elif program == "make":
            assert words[0] in targets
        elif program in ("python", "pytest"):
            assert (ROOT / words[0]).is_file(), words
        for word in words:
            if re.match(r"(jobs|clusters)/[^*]+$", word):
                assert (ROOT / word).exists(), word


def test_commands_in_the_text_exist() -> None:
    known = set(get_command(app).commands)  # type: ignore[attr-defined]
    for page in PAGES:
        found = re.findall(r"`fedray ([a-z][a-z-]*)", page.read_text("utf-8"))
        assert known.issuperset(found), f"{page.name}: {set(found) - known}"


@pytest.fixture
def classes_of_the_pages(own_folder: Path) -> None:
    """The classes of extending.md can be imported."""
    for name, text in EXAMPLES.items():
        (own_folder / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("block", blocks("yaml"))
def test_configurations_are_valid(block: str, classes_of_the_pages: None) -> None:
    """A whole experiment, a sweep, or some sections of an experiment."""
    found = parse_yaml(block, "block")
    if "space" in found:
        configs = [trial.config for trial in trials_of(load_sweep({**found, "base": str(ROOT / found["base"])}))]
    else:
        configs = [load_config({**SMALLEST, "method": "fedavg", **found})]
    for config in configs:
        for entry in config.method:
            build_method(config, entry)


@pytest.mark.parametrize("block", blocks("python"))
def test_imports_are_found(block: str) -> None:
    if ">>>" in block:
        block = "".join(example.source for example in doctest.DocTestParser().get_examples(block))
    own = {Path(name).stem for name in EXAMPLES}
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Import):
            for name in node.names:
                importlib.import_module(name.name)
        elif isinstance(node, ast.ImportFrom) and node.module not in own:
            module = importlib.import_module(str(node.module))
            for name in node.names:
                assert hasattr(module, name.name) or importlib.import_module(f"{node.module}.{name.name}")


def test_links_between_files_of_the_repository() -> None:
    """As a reader of the files follows them; tests of the site follow those within docs/, with their anchors."""
    for page in PAGES:
        text = BLOCK.sub("", page.read_text("utf-8"))
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[\w-]+)?\)", text):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


@pytest.mark.parametrize("block", blocks("json"))
def test_json_can_be_read(block: str) -> None:
    """One value, or one per line."""
    try:
        json.loads(block)
    except json.JSONDecodeError:
        assert [json.loads(line) for line in block.splitlines() if line]
