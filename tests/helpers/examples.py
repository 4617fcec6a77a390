"""The examples of docs/extending.md, which the tests run as they stand."""

import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")

EXAMPLES: dict[str, str] = dict(re.findall(r"^`([\w.]+)`:\n\n```\w+\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE))
"""Name of each file on the page -> its text."""

SHELL: list[str] = re.findall(r"^```sh\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)
"""The page's commands, block by block."""
