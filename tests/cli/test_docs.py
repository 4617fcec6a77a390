"""The documentation's examples and commands run as they stand."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedray.cli.app import app
from fedray.sweeps.result import SweepResult

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands(text: str) -> list[str]:
    """Return the lines of a page's shell examples, without comments."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.slow
def test_the_examples_of_the_python_page(own_cluster: None, tmp_path: Path) -> None:
    """In a process and a folder of their own: they start Ray, write below `runs`, and write a method's file."""
    # transformers imports DeepSpeed when it saves a model, which otherwise prints that it found no GPU.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "doctest", str(ROOT / "docs" / "python.md")]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert SweepResult.load(tmp_path / "runs" / "sweep").complete, "they ran, and not only passed"


def test_the_commands_of_the_readme_are_understood() -> None:
    """Each names a subcommand, options and files that there are."""
    found = [shlex.split(line)[1:] for line in commands(README) if line.startswith(".venv/bin/fedray")]
    assert len(found) >= 8
    for words in found:
        ended = CliRunner().invoke(app, [*words[: 2 if words[0] == "jobs" else 1], "--help"])
        assert ended.exit_code == 0, words
        for option in (word for word in words if word.startswith("--")):
            assert option in ended.output, words
        for file in (word for word in words if word.endswith(".yaml")):
            assert (ROOT / file).is_file(), words


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_readmes_way_to_a_cluster(own_cluster: None) -> None:
    """From the start of the local cluster over a federation and a sweep to its end, as they stand in the README."""
    section = README.split("## On a cluster")[1].split("\n## ")[0]
    lines = [line.replace(".venv/bin/", f"{Path(sys.executable).parent}/") for line in commands(section)]
    assert "local.py up" in lines[0]
    assert "local.py down" in lines[-1]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = kept | {"FEDRAY_LOCAL_CLUSTER": f"/tmp/fedray-readme-{os.getpid()}"}
    try:
        for line in lines[:-1]:
            ended = subprocess.run(
                shlex.split(line), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
            )
            assert ended.returncode == 0, f"{line}\n{ended.stdout}\n{ended.stderr}"
    finally:
        subprocess.run(shlex.split(lines[-1]), cwd=ROOT, env=environment, check=True, timeout=100)
