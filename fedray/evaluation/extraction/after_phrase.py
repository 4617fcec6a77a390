"""What follows a phrase: the commonsense tasks of pyreft (arXiv 2404.03592, examples/loreft/compute_metrics.py)."""

from typing import Annotated

from pydantic import Field

from fedray.evaluation.extraction_rule import ExtractionRule


class AfterPhrase(ExtractionRule):
    """All that follows the first occurrence of a phrase, without the blanks around it; no answer without the phrase.

    "the correct answer is true." gives `true.`, which is wrong where `true` is expected, so this rule is stricter than
    `first_label`. A reference without the phrase is the answer itself.
    """

    name = "after_phrase"

    phrase: Annotated[str, Field(min_length=1)] = "the correct answer is "
    """Upper and lower case and blanks count."""

    def extract(self, text: str) -> str | None:
        return text.partition(self.phrase)[2].strip() or None

    def expected(self, reference: str) -> str | None:
        return self.extract(reference) if self.phrase in reference else reference.strip() or None


ENTRY = AfterPhrase
