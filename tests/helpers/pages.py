"""The pages of the documentation and their code blocks."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "clusters" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
"""The language, which may be missing, and the lines of a block."""


def command_lines(block: str) -> Iterator[list[str]]:
    """Yield the words of every line, without comments and without the folder of the environment."""
    for line in block.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield [words[0].removeprefix(".venv/bin/"), *words[1:]]
