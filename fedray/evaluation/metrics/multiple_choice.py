"""Multiple choice by likelihood: lm-evaluation-harness' `acc`, `acc_norm` and `acc_bytes`."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fedray.config.metric import Metric


class MultipleChoice(Metric):
    """The share of examples whose right option has the greatest log-likelihood, or log-likelihood per length, of all
    options. Of equal ones the first is taken."""

    name = "multiple_choice"
    tasks = ("causal_lm",)
    reads = "likelihoods"
    proportion = True
    of_one_example = True

    normalise: Literal["none", "characters", "bytes"] = "none"
    """What an option's log-likelihood is divided by: nothing (lm-evaluation-harness' `acc`), the characters of its text
    (`acc_norm`), or its bytes in UTF-8 (`acc_bytes`); blanks around a text do not count."""

    @property
    def label(self) -> str:
        return super().label if self.normalise == "none" else f"{super().label}_{self.normalise}"

    def compute(
        self, likelihoods: Sequence[npt.NDArray[Any]], options: Sequence[Sequence[str]], right: Sequence[int]
    ) -> float:
        rows = zip(likelihoods, options, right, strict=True)
        return float(np.mean([np.argmax(own / self._lengths(texts)) == index for own, texts, index in rows]))

    def _lengths(self, texts: Sequence[str]) -> npt.NDArray[np.float64]:
        if self.normalise == "none":
            return np.ones(len(texts))
        return np.array([len(text if self.normalise == "characters" else text.encode()) for text in texts], np.float64)


ENTRY = MultipleChoice
