"""A report before it is drawn: sections with tables, figures, and sentences about what is missing."""

from collections.abc import Iterator
from dataclasses import dataclass

from fedray.report.figure import Card, Figure, Listing
from fedray.results.sheets import Sheet


@dataclass(frozen=True)
class Text:
    """A text that is copied, such as a configuration or commands.

    Attributes:
        folded: whether the page shows it only when asked.
    """

    title: str
    text: str
    folded: bool = False


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        key: its place within the page's address.
        sheets: tables that are shown; `more` are tables that are shown when asked.
        notes: what the section lacks and why, and what to know.
    """

    key: str
    title: str
    cards: tuple[Card, ...] = ()
    sheets: tuple[Sheet, ...] = ()
    listings: tuple[Listing, ...] = ()
    more: tuple[Sheet, ...] = ()
    texts: tuple[Text, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """A report.

    Attributes:
        title: the name of the run or the sweep.
        facts: what was run, as names with values.
    """

    title: str
    facts: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...]

    def figures(self) -> Iterator[Figure]:
        """Yield all figures in the order of the page."""
        for section in self.sections:
            for card in section.cards:
                yield from card.views.values()
