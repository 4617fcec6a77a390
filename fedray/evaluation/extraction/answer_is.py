"""The first number after "the answer is": GSM8K in FederatedScope and FedSA-LoRA (arXiv 2410.01463,
eval_for_gsm8k/eval.py), after zero-shot chain of thought (Kojima et al., 2022, arXiv 2205.11916)."""

from fedray.evaluation.extraction.gsm8k import Gsm8k
from fedray.evaluation.extraction.last_number import numbers
from fedray.evaluation.extraction_rule import ExtractionRule

PHRASE = "the answer is"


class AnswerIs(ExtractionRule):
    """The first number after "the answer is" in any case; without the phrase, the last number.

    A text with the phrase gives no answer if there is no number before its next occurrence. Commas and a final point
    are removed. Answers are compared as texts: "18.00" is wrong where 18 is expected. A reference gives what follows
    its "#### ", as in GSM8K; without that it is read like a generated text.
    """

    name = "answer_is"

    def extract(self, text: str) -> str | None:
        before, *after = text.lower().split(PHRASE)
        found = numbers(after[0])[:1] if after else numbers(before)[-1:]
        return found[0].removesuffix(".") if found else None

    def expected(self, reference: str) -> str | None:
        return Gsm8k().extract(reference) or self.extract(reference)


ENTRY = AnswerIs
