"""The arithmetic tasks of LLM-Adapters in one data set: numbers, and letters in AQuA (arXiv 2404.03592, pyreft's
examples/loreft/compute_metrics.py)."""

from fedray.evaluation.extraction.first_letter import FirstLetter
from fedray.evaluation.extraction.last_number import LastNumber
from fedray.evaluation.extraction_rule import ExtractionRule


class Maths(ExtractionRule):
    """`first_letter` where the reference is a single letter from A to E, else `last_number`.

    A reference that is a whole solution gives a number, so AQuA's references must be its letters.
    """

    name = "maths"

    def extract(self, text: str) -> str | None:
        return LastNumber().extract(text) or FirstLetter().extract(text)

    def expected(self, reference: str) -> str | None:
        letter = reference.strip()
        return letter if _is_letter(letter) else LastNumber().extract(reference)

    def correct(self, text: str, expected: str) -> bool:
        rule = FirstLetter() if _is_letter(expected) else LastNumber()
        return rule.correct(text, expected)


def _is_letter(answer: str) -> bool:
    return len(answer) == 1 and FirstLetter().extract(answer) is not None


ENTRY = Maths
