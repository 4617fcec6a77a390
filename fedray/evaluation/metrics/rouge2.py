"""ROUGE-2 of the generated answers (Lin, 2004): common pairs of neighbouring words."""

from fedray.evaluation.rouge import PublishedRouge


class Rouge2(PublishedRouge):
    """As `rouge1`, of pairs of neighbouring words; 0.0 where either text has a single word."""

    name = "rouge2"


ENTRY = Rouge2
