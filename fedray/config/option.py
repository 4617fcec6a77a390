"""Options that a configuration gives by name, or by class with fields: the metric, and a method's aggregation rule."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import model_validator

from fedray.config.section import Section


class Option(Section):
    """A choice with fields of its own, such as `accuracy`, `{name: trimmed_mean, trim: 0.1}` or `{class: my.Rule}`.

    Attributes:
        name: what tables and messages call it; default the name of the class.
    """

    name: ClassVar[str] = ""

    @model_validator(mode="before")
    @classmethod
    def _without_selection(cls, value: Any) -> Any:
        """Drop the keys by which a registry has selected this class: they are no fields."""
        if isinstance(value, Mapping):
            return {key: entry for key, entry in value.items() if key not in ("name", "class")}
        return value

    @property
    def label(self) -> str:
        """What tables and messages call it."""
        return self.name or type(self).__name__
