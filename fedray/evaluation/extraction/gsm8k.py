"""The number after "#### ": GSM8K's own evaluation (Cobbe et al., 2021, arXiv 2110.14168, dataset.py)."""

import re

from fedray.evaluation.extraction_rule import ExtractionRule


class Gsm8k(ExtractionRule):
    """The number after the first "#### ", without commas.

    Answers are compared as texts: "#### 18.0" is wrong where 18 is expected. "#### $18" gives no answer.
    """

    name = "gsm8k"

    def extract(self, text: str) -> str | None:
        found = re.search(r"#### (-?[0-9.,]+)", text)
        return found and found[1].replace(",", "")


ENTRY = Gsm8k
