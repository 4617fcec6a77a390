"""The first letter from A to E in the text: AQuA in LLM-Adapters (arXiv 2304.01933, evaluate.py) and in pyreft."""

import re
from typing import Annotated

from pydantic import Field

from fedray.evaluation.extraction_rule import ExtractionRule


class FirstLetter(ExtractionRule):
    """The first capital letter that names an option, anywhere in the text.

    It may be within a word: "An apple" gives A, and so does "Answer: B". A reference gives the last of these letters
    that stands alone: "B", "(B)", or a solution that ends with one.
    """

    name = "first_letter"

    letters: Annotated[str, Field(pattern="^[A-Z]{2,}$")] = "ABCDE"
    """The letters that name options."""

    def extract(self, text: str) -> str | None:
        found = re.search(f"[{self.letters}]", text)
        return found and found[0]

    def expected(self, reference: str) -> str | None:
        alone = re.findall(rf"\b[{self.letters}]\b", reference)
        return alone[-1] if alone else None


ENTRY = FirstLetter
