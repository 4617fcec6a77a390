"""The examples of pages in docs/, which the tests run as they stand."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def examples_of(page: str) -> dict[str, str]:
    """Return the files on a page: name -> text."""
    found = re.findall(r"^`([\w./]+)`:\n\n```\w*\n(.*?)```", page, re.DOTALL | re.MULTILINE)
    return dict(found)


PAGE = (DOCS / "extending.md").read_text(encoding="utf-8")

EXAMPLES = examples_of(PAGE)
"""Files of docs/extending.md."""

SHELL: list[str] = re.findall(r"^```sh\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)
"""The page's commands, block by block."""
