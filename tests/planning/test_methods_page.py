"""docs/methods.md is as its script writes it, and has a paragraph on every method."""

import re

from methods_page import PAGE, written

from fedray.methods.registry import METHODS
from fedray.planning.catalogue import catalogue


def test_the_table_is_current() -> None:
    """Otherwise run python tests/helpers/methods_page.py --write."""
    page = PAGE.read_text("utf-8")
    assert written(page, catalogue()) == page


def test_every_method_has_a_paragraph() -> None:
    """Under a heading with its name, to which the table links."""
    sections = re.split(r"^#+ (.*)$", PAGE.read_text("utf-8"), flags=re.MULTILINE)
    texts = dict(zip(sections[1::2], sections[2::2], strict=True))
    for name in METHODS.names:
        assert len(texts.get(name, "").split()) >= 10, f"{name}: docs/methods.md does not say when to choose it"
