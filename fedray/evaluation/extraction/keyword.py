"""A word anywhere in the text, or else a default: sentiment in FlowerTune's finance challenge (adap/flower,
benchmarks/flowertune-llm/evaluation/finance)."""

from typing import Annotated

from pydantic import Field

from fedray.evaluation.extraction_rule import ExtractionRule


class Keyword(ExtractionRule):
    """The first word of the option that is anywhere in the text, as it stands or capitalised; the default if none is.

    The order is that of the option, not that of the text: "not negative but positive" gives `positive`. An empty text
    gives `neutral`, so a model that generates nothing is right on neutral examples.

    The prompt is expected to end with "Answer: ". What follows another "Answer: " is not read: there the model
    continues with an example of its own. A reference is read in the same way.
    """

    name = "keyword"

    words: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] = ("positive", "negative")
    """The words, the one that is looked for first in front."""
    default: Annotated[str, Field(min_length=1)] = "neutral"
    """The answer of a text without any of them."""

    def extract(self, text: str) -> str | None:
        read = text.partition("Answer: ")[0]
        return next((word for word in self.words if word in read or word.capitalize() in read), self.default)


ENTRY = Keyword
