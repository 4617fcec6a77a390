"""docs/statistics.md: its example and commands run as they stand."""

import doctest
import re
import shlex
from pathlib import Path

from typer.testing import CliRunner

from fedray.cli.app import app

PAGE = Path(__file__).parents[2] / "docs" / "statistics.md"


def test_the_example_and_the_commands(own_folder: Path) -> None:
    failed, tried = doctest.testfile(str(PAGE), module_relative=False, encoding="utf-8")
    assert (failed, tried > 5) == (0, True)
    block = re.findall(r"```sh\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    lines = [line for part in block for line in part.splitlines()]
    assert len(lines) == 4
    for line in lines:
        program, *words = shlex.split(line)
        ended = CliRunner().invoke(app, words)
        assert (program, ended.exit_code) == ("fedray", 0), f"{line}\n{ended.output}"
    assert (own_folder / "table.tex").read_text("utf-8").count(r"\toprule") == 3


def test_the_table_of_coverage_is_that_of_the_simulations() -> None:
    """The column of five seeds, against the formula by which tests/results/test_statistics.py tests the intervals."""
    pattern = r"^\| (none|as large|ten times as large) \| \d+ % \| (\d+) % \|"
    rows = re.findall(pattern, PAGE.read_text("utf-8"), re.MULTILINE)
    assert [name for name, _ in rows] == ["none", "as large", "ten times as large"]
    for (_, shown), formula in zip(rows, (98.4, 95.4, 87.9), strict=True):
        assert abs(int(shown) - formula) <= 1.5
