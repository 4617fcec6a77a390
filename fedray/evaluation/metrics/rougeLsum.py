"""ROUGE-Lsum of the generated answers (Lin, 2004, section 3.2): longest common subsequences line by line."""

from fedray.evaluation.rouge import PublishedRouge


class RougeLsum(PublishedRouge):
    """2PR / (P + R) with P, R the number of common words over the number of words of prediction and reference.

    A word of a line of the reference is common if it is in the longest common subsequence with one of the prediction's
    lines. No word counts more often than either text has it. Lines end at "\\n"; for texts of one line it is `rougeL`.
    """

    name = "rougeLsum"


ENTRY = RougeLsum
