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


REPORTED = {
    "fedalt": "FLAN, Llama-2-7B: 67.6 ᵃ",
    "feddpa": "FLAN: 64.6 ᵃ; GLUE: 89.47 ᵇ",
    "fdlora": "FLAN: 65.2 ᵃ",
    "fedit": "FLAN: 62.2 ᵃ; commonsense: 75.74 ᶜ",
    "local": "FLAN: 62.9 ᵃ",
    "ffa_lora": "GLUE: 89.39 ᵇ; commonsense: 71.11 ᶜ",
    "fedsa_lora": "GLUE: 90.43 ᵇ",
    "fedreft": "GLUE: 90.46 ᶜ; commonsense: 76.22 ᶜ",
    "flora": "commonsense: 78.83 ᶜ",
    "fed_sb": "commonsense: 75.66 ᶜ",
    "fedtreelora": "FLAN: 63.19 ᵈ; GLUE: 92.36 ᵈ",
    "fedlease": "GLUE: 91.19 ᵈ",
}
"""What papers report, in percent: means over tasks. The page says which paper, and how far it was checked."""


def written(page: str, methods: Sequence[MethodFacts]) -> str:
    """Return the page with the table of these methods."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    header = ["| " + " | ".join((*COLUMNS, "reported", "paper")) + " |", "|" + "---|" * (len(COLUMNS) + 2)]
    return "\n".join([before + BEGIN, *header, *map(_row, methods), END + after])


def _row(facts: MethodFacts) -> str:
    name, *others = cells(facts)
    paper = f"[{facts.arxiv}](https://arxiv.org/abs/{facts.arxiv})" if facts.arxiv else "–"
    return (
        "| "
        + " | ".join((f"[`{name}`](#{name})", *others, REPORTED.get(name, "not checked"), paper)).replace("\n", " ")
        + " |"
    )


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
