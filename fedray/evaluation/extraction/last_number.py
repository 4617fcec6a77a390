"""The last number in the text: the arithmetic tasks of LLM-Adapters (arXiv 2304.01933, evaluate.py), and those of
pyreft (arXiv 2404.03592, examples/loreft/compute_metrics.py), GSM8K included."""

import re
from typing import Annotated

from pydantic import Field

from fedray.evaluation.extraction_rule import ExtractionRule


class LastNumber(ExtractionRule):
    """The last number, perhaps with decimals and a minus sign; it is correct within a tolerance.

    "1,000" gives 1000, "1,2" gives 12, and "3-4" gives -4. A reference is read in the same way, so it can be a number
    or, as in GSM8K, a solution that ends with one.
    """

    name = "last_number"

    tolerance: Annotated[float, Field(ge=0)] = 0.001
    """Largest difference from the expected number."""

    def extract(self, text: str) -> str | None:
        found = numbers(text)
        return found[-1] if found else None

    def correct(self, text: str, expected: str) -> bool:
        found = self.extract(text)
        return found is not None and abs(float(found) - float(expected)) <= self.tolerance


def numbers(text: str) -> list[str]:
    """Return the numbers in a text as they stand there, without the commas in them."""
    return re.findall(r"-?\d+\.?\d*", text.replace(",", ""))


ENTRY = LastNumber
