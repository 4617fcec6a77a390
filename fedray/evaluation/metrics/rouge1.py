"""ROUGE-1 of the generated answers (Lin, 2004): common words."""

from fedray.evaluation.rouge import PublishedRouge


class Rouge1(PublishedRouge):
    """2PR / (P + R) with P, R the number of common words over the number of words of prediction and reference. A word
    counts as often as both texts have it."""

    name = "rouge1"


ENTRY = Rouge1
