"""The families of docs/models.md are tried again, and what is seen is compared with the page."""

from pathlib import Path

import pytest
from families import NAMES, NOT_BUILT
from family_sweep import BEGIN, END, FAST, PAGE, families, sweep, written

TABLE = PAGE.read_text("utf-8").partition(BEGIN)[2].partition(END)[0]
LINES = {line.split("`")[1]: line for line in TABLE.splitlines() if line.startswith("| `")}


def test_the_page_has_the_sweeps_families() -> None:
    assert sorted(LINES) == families()
    assert set(FAST) <= set(LINES)


def test_every_family_of_transformers_is_tried_or_has_a_reason() -> None:
    every = set(NAMES["causal_lm"]) | set(NAMES["classification"])
    assert every == {*families(), *NOT_BUILT}


def test_the_page_is_as_the_script_writes_it() -> None:
    page = PAGE.read_text("utf-8")
    assert written(page, []) == page


@pytest.mark.parametrize("family", FAST)
def test_families(family: str, tmp_path: Path) -> None:
    assert sweep(family, tmp_path).line() == LINES[family]


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(families()) - set(FAST)))
def test_all_families(family: str, tmp_path: Path) -> None:
    assert sweep(family, tmp_path).line() == LINES[family]
