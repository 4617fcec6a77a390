"""What an extraction rule is, and how a configuration names one: `last_number`, or `{class: my_rule.MyRule, ...its
fields}`.

The built-in rules are the modules of `fedray.evaluation.extraction`; each names the published evaluation that it
follows. The smallest rule:

    from fedray.evaluation.extraction_rule import ExtractionRule

    class LastLine(ExtractionRule):
        def extract(self, text):
            return text.strip().rpartition("\\n")[2] or None
"""

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, SerializeAsAny

from fedray.config.option import Option
from fedray.config.registry import Registry
from fedray.errors import choices


class ExtractionRule(Option):
    """Finds the answer that a text gives. Fields of a subclass are its options."""

    must_define: ClassVar[tuple[str, ...]] = ("extract",)

    @classmethod
    def registry(cls) -> Registry[Any]:
        return EXTRACTION_RULES

    def extract(self, text: str) -> str | None:
        """Return the answer that a generated text gives; None if it gives none, which is wrong."""
        raise NotImplementedError

    def expected(self, reference: str) -> str | None:
        """Return the answer that a reference gives, by default as for a generated text; None if it gives none, which is
        an error of the data."""
        return self.extract(reference)

    def correct(self, text: str, expected: str) -> bool:
        """Return whether a generated text gives the expected answer, by default: whether the answers are equal."""
        return self.extract(text) == expected


EXTRACTION_RULES = Registry("extraction rule", "fedray.evaluation.extraction", ExtractionRule)


def _parse(value: Any) -> Any:
    if value is None:
        own = "or a mapping with the `class` (module.Class) of your own"
        raise ValueError(f"missing; allowed: {choices(EXTRACTION_RULES.names)}, {own}")
    return EXTRACTION_RULES.parse(value)


ExtractionRuleOption = Annotated[SerializeAsAny[ExtractionRule], BeforeValidator(_parse), Field(validate_default=True)]
"""An extraction rule as a field of a metric."""
