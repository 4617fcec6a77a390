"""What an aggregation rule is, and how a method names one: `mean`, or `{class: my_rule.MyRule, ...its fields}`.

The built-in rules are the modules of `fedray.aggregation.rules`. The smallest rule:

    import numpy as np

    from fedray.aggregation.rule import Rule

    class Median(Rule):
        def everybody(self, points):
            return np.median(points, axis=0).astype(np.float32)
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator

from fedray.config.option import Option
from fedray.config.registry import Registry
from fedray.errors import choices, nearest
from fedray.types import Vector

Points = npt.NDArray[np.float32]
"""One client's vector per row, [n, d]."""


class Rule(Option):
    """Makes one vector of the vectors of several clients. Fields of a subclass are its options."""

    must_define: ClassVar[tuple[str, ...]] = ("everybody",)

    @classmethod
    def registry(cls) -> Registry[Any]:
        return RULES

    def everybody(self, points: Points) -> Vector:
        """Return the aggregate of all points. [n, d] with n >= 1 -> float32 [d]"""
        raise NotImplementedError

    def leave_one_out(self, points: Points) -> Points:
        """Return row k = the aggregate of all points but the k-th. [n, d] with n >= 2 -> float32 [n, d]

        A rule that can do better than to aggregate n times overrides this.
        """
        return np.stack([self.everybody(np.delete(points, k, axis=0)) for k in range(len(points))])


RULES = Registry("aggregation rule", "fedray.aggregation.rules", Rule)


def rule_among(*names: str) -> BeforeValidator:
    """Return the check of an option that takes one of these built-in rules, or any of the user's own.

    The option's type is `Annotated[str | Rule, rule_among(...)]`: the name of a built-in rule, whose fields are options
    of the method, or a rule that was given with its own fields.
    """

    def checked(value: Any) -> str | Rule:
        name = value.get(RULES.key) if isinstance(value, Mapping) else value
        if isinstance(name, str) and name not in names:
            raise ValueError(f"unknown {RULES.kind} {name!r}{nearest(name, names)}; allowed: {choices(names)}")
        found = value if isinstance(value, str) else RULES.parse(value)
        if not isinstance(found, str | Rule):
            raise ValueError(f"expected the name of an {RULES.kind}, or a mapping with its `class`, got {value!r}")
        return found

    return BeforeValidator(checked)
