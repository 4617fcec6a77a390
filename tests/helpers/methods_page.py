"""Writes the table of docs/methods.md from the methods' code.

python tests/helpers/methods_page.py --write      the table is replaced in the page
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from fedray.planning.catalogue import MethodFacts, catalogue
from fedray.results.method_tables import COLUMNS, cells

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
BEGIN, END = "<!-- methods: begin -->", "<!-- methods: end -->"


def written(page: str, methods: Sequence[MethodFacts]) -> str:
    """Return the page with the table of these methods."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    header = ["| " + " | ".join((*COLUMNS, "paper")) + " |", "|" + "---|" * (len(COLUMNS) + 1)]
    return "\n".join([before + BEGIN, *header, *map(_row, methods), END + after])


def _row(facts: MethodFacts) -> str:
    name, *others = cells(facts)
    paper = f"[{facts.arxiv}](https://arxiv.org/abs/{facts.arxiv})" if facts.arxiv else "–"
    return "| " + " | ".join((f"[`{name}`](#{name})", *others, paper)).replace("\n", " ") + " |"


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"replace the table in {PAGE.name}")
    options = parser.parse_args()
    page = written(PAGE.read_text("utf-8"), catalogue())
    if options.write:
        PAGE.write_text(page, "utf-8")
    else:
        print(page)


if __name__ == "__main__":
    main()
