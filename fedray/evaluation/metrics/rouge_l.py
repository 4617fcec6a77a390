"""ROUGE-L of the generated answers (Lin, 2004): the longest common subsequence of words, in any script.

The metric for texts that are not English. `rougeL` is the one that papers report: it stems, and its words are runs of
ASCII letters and digits, so it is 0 for texts in another script and splits "naïve" into two words.
"""

import re
from collections.abc import Sequence

import numpy as np

from fedray.config.metric import Metric


class RougeL(Metric):
    """The mean ROUGE-L F-measure in [0, 1]: 2PR / (P + R) with P, R the length of the longest common subsequence of
    words over the number of words of prediction and reference. Words are runs of letters and digits of any script,
    without case."""

    name = "rouge_l"
    tasks = ("causal_lm",)
    of_one_example = True
    reads = "texts"

    def compute(self, generated: Sequence[str], references: Sequence[str]) -> float:
        return float(np.mean([_rouge_l(_words(a), _words(b)) for a, b in zip(generated, references, strict=True)]))


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.casefold())


def _rouge_l(prediction: list[str], reference: list[str]) -> float:
    common = _longest_common_subsequence(prediction, reference)
    return 2 * common / (len(prediction) + len(reference)) if common else 0.0


def _longest_common_subsequence(a: list[str], b: list[str]) -> int:
    """Return its length by dynamic programming; row[j] is that of the words of `a` so far and the first j of `b`."""
    row = [0] * (len(b) + 1)
    for word in a:
        above_left = 0
        for j, other in enumerate(b, start=1):
            above_left, row[j] = row[j], above_left + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


ENTRY = RougeL
