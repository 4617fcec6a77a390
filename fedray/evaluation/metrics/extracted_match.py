"""The share of generated texts that give the right answer, which a rule reads from the text."""

from collections.abc import Sequence

import numpy as np

from fedray.config.metric import Metric
from fedray.errors import DataError
from fedray.evaluation.extraction_rule import ExtractionRuleOption


class ExtractedMatch(Metric):
    """The share of texts whose answer is that of the reference. A text without an answer is wrong."""

    name = "extracted_match"
    tasks = ("causal_lm",)
    reads = "texts"
    proportion = True
    of_one_example = True

    rule: ExtractionRuleOption = None  # type: ignore[assignment]  # refused: there is no default
    """How the answer is read from a text; `fedray/evaluation/extraction/` has a file per rule."""

    @property
    def label(self) -> str:
        return f"{self.rule.label}_match"

    def compute(self, generated: Sequence[str], references: Sequence[str]) -> float:
        pairs = zip(generated, references, strict=True)
        return float(np.mean([self.rule.correct(text, self._expected(reference)) for text, reference in pairs]))

    def check_references(self, references: Sequence[str]) -> None:
        for reference in references:
            self._expected(reference)

    def _expected(self, reference: str) -> str:
        """Return the answer of a reference.

        Raises:
            DataError: it has none.
        """
        expected = self.rule.expected(reference)
        if expected is None:
            shown = reference if len(reference) <= 80 else f"{reference[:40]} ... {reference[-40:]}"
            raise DataError(
                f"metric {self.name}: the rule {self.rule.label} finds no answer in the reference {shown!r}; choose "
                "another rule, or another column as data.answer"
            )
        return expected


ENTRY = ExtractedMatch
