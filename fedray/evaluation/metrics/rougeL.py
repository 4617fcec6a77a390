"""ROUGE-L of the generated answers (Lin, 2004): the longest common subsequence of words, over the whole text."""

from fedray.evaluation.rouge import PublishedRouge


class RougeL(PublishedRouge):
    """2PR / (P + R) with P, R the length of the longest common subsequence of words over the number of words of
    prediction and reference. `rouge_l` is its counterpart for any script, unstemmed."""

    name = "rougeL"


ENTRY = RougeL
