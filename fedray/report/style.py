"""Colours, marks and dashes: told apart by colour-blind readers, in print without colours, and in every figure the same
for a method."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Of Okabe and Ito (2008), without black, which a dark page hides, and yellow, which a light one does."""
GREY = "#8a8f98"
"""Lines in the background; visible on a light and on a dark page."""
MARKS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star", "triangle-down")
"""Names of plotly."""
DASHES = ("solid", "dash", "dot")
"""Every colour is used with the first one before any is used with the second."""
PATTERNS = ("", "/", "x", ".", "-", "|")
"""How the parts of bars are filled; names of plotly, and of matplotlib's hatches."""
SEQUENTIAL = "Viridis"
"""Colours of matrices."""
ALL_STYLED = 8
"""Up to this number of methods, each has a style of its own."""
STYLED = 6
"""Of more methods, the best ones that have a style of their own; the others are grey."""


@dataclass(frozen=True)
class Style:
    """How one line looks."""

    colour: str
    mark: str
    dash: str


def style(index: int | None) -> Style:
    """Return a style by its index; None is the background's."""
    if index is None:
        return Style(GREY, "circle", "solid")
    return Style(COLOURS[index % len(COLOURS)], MARKS[index % len(MARKS)], DASHES[index // len(COLOURS) % len(DASHES)])


def method_styles(methods: Sequence[str], best_first: Sequence[str], always: Sequence[str]) -> Mapping[str, int | None]:
    """Return the index of each method's style, None for those in the background.

    Args:
        methods: in the configuration's order.
        best_first: those that have a score.
        always: methods that have a style whatever their score, such as references.
    """
    if len(methods) <= ALL_STYLED:
        return {method: index for index, method in enumerate(methods)}
    shown = list(dict.fromkeys([*best_first[:STYLED], *(name for name in always if name in methods)]))
    return {method: shown.index(method) if method in shown else None for method in methods}
