"""docs/report.md: its commands run as they stand, and its sections are those of a page."""

import re
import shlex
from pathlib import Path

import yaml
from reported import REPORTED
from typer.testing import CliRunner

from fedray.cli.app import app

PAGE = Path(__file__).parents[2] / "docs" / "report.md"


def test_the_commands_and_the_sections(own_folder: Path) -> None:
    config = REPORTED | {"method": ["local", "fedavg"], "rounds": 1, "evaluation": {}, "report": False}
    (own_folder / "config.yaml").write_text(yaml.safe_dump(config))
    text = PAGE.read_text("utf-8")
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    assert len(lines) == 4
    for line in lines:
        program, *words = shlex.split(line, comments=True)
        ended = CliRunner().invoke(app, words)
        assert (program, ended.exit_code) == ("fedray", 0), f"{line}\n{ended.output}"
    assert (own_folder / "tiny-data.html").is_file()
    html = (own_folder / "runs" / "mine" / "report.html").read_text("utf-8")
    sections = re.findall(r"<h2>(.*?)</h2>", html)
    said = [name for name in re.findall(r"^\| ([A-Z].*?) \|", text, re.MULTILINE) if name != "Sweep"]
    assert sections == said
    titles = (own_folder / "figures" / "figures.json").read_text("utf-8")
    for name in ("traffic", "partition-class-train", "curve-loss-by-round"):
        assert f'"{name}"' in titles
        assert (own_folder / "figures" / f"{name}.svg").is_file()
