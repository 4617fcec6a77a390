"""ROUGE as papers report it, through Google's package `rouge-score`; `evaluate` uses the same package.

Texts are lower-cased, words are runs of ASCII letters and digits, and words of more than three letters are stemmed
(Porter) if the option says so.
"""

from collections.abc import Sequence

import numpy as np

from fedray.config.metric import Metric


class PublishedRouge(Metric):
    """The mean F-measure in [0, 1] over the examples, of the kind of ROUGE that the subclass is named after; 0.0 for an
    example where either text has no word.

    `evaluate` reports the median of the mean over bootstrap samples instead, which differs in the fourth digit and from
    call to call.
    """

    tasks = ("causal_lm",)
    of_one_example = True
    reads = "texts"
    libraries = ("rouge_score.rouge_scorer", "rouge_score.tokenizers")  # they import all of nltk

    stem: bool = True
    """Whether words are stemmed, so that "running" equals "runs"."""

    @property
    def label(self) -> str:
        return super().label if self.stem else f"{super().label}_unstemmed"

    def compute(self, generated: Sequence[str], references: Sequence[str]) -> float:
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.tokenizers import DefaultTokenizer

        # With a tokenizer of its own the package would log one line per scorer.
        scorer = RougeScorer([self.name], tokenizer=DefaultTokenizer(use_stemmer=self.stem))
        pairs = zip(generated, references, strict=True)
        return float(np.mean([scorer.score(reference, text)[self.name].fmeasure for text, reference in pairs]))
