"""Exact match of the generated answers, after SQuAD's normalisation of case, spacing and outer punctuation."""

import string
from collections.abc import Sequence

import numpy as np

from fedray.config.metric import Metric


class ExactMatch(Metric):
    """The share of texts that are equal up to case, spacing, and punctuation at both ends."""

    name = "exact_match"
    tasks = ("causal_lm",)
    reads = "texts"
    proportion = True
    of_one_example = True

    def compute(self, generated: Sequence[str], references: Sequence[str]) -> float:
        return float(np.mean([_normal(a) == _normal(b) for a, b in zip(generated, references, strict=True)]))


def _normal(text: str) -> str:
    return " ".join(text.casefold().split()).strip(string.punctuation + " ")


ENTRY = ExactMatch
