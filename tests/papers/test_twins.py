"""The kits' twins on public data: they are valid, and a short run of them learns."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedray.cli.app import app
from fedray.results.run_result import RunResult

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(("twin", "methods"), [("k4_twin", "[fedavg]"), ("k7_twin", "[fedit, fedhft]")])
def test_a_short_run_of_a_twin_learns(
    twin: str, methods: str, shared_data: Path, minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guessing has an accuracy of 1/7. Some of its methods train all clients for two rounds, in this process."""
    monkeypatch.chdir(ROOT)
    short = [f"method={methods}", "rounds=2", "runtime=inline", "evaluation.every=0", f"data.cache_dir={tmp_path}"]
    output = tmp_path / "run"
    ended: Any = CliRunner().invoke(app, ["run", f"jobs/papers/{twin}.yaml", *short, "--output", str(output)])
    assert ended.exit_code == 0, ended.output
    scores = RunResult.load(output).scores().query("moment == 'personalised' and examples == 'test' and group == ''")
    assert len(scores) == len(RunResult.load(output).config.method)
    assert (scores["mean"] > 2 / 7).all(), scores
