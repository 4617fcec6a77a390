"""F1 of one class: the harmonic mean of its precision and recall (the metric of MRPC and QQP in GLUE)."""

from collections.abc import Sequence
from typing import Annotated, Any, Self

import numpy.typing as npt
from pydantic import Field

from fedray.config.metric import Metric
from fedray.errors import ConfigError, choices, nearest


class F1(Metric):
    """2PR / (P + R) with precision P and recall R of the positive class; 0.0 if no prediction or no label is that
    class."""

    name = "f1"
    tasks = ("classification",)
    libraries = ("sklearn.metrics",)

    positive: Annotated[int, Field(ge=0)] | str = 1
    """The positive class: its name, or its index. Classes are in the order of their names (by value if all are whole
    numbers), or in that of the checkpoint's own head if it has the same classes; so of `equivalent` and
    `not_equivalent` the class 1 is the latter."""

    def compute(self, predictions: npt.NDArray[Any], labels: npt.NDArray[Any]) -> float:
        from sklearn.metrics import f1_score

        return float(f1_score(labels == self.positive, predictions == self.positive, zero_division=0.0))

    def for_classes(self, label_names: Sequence[str]) -> Self:
        if isinstance(self.positive, str):
            if self.positive not in label_names:
                raise ConfigError(
                    f"metric {self.label}: positive: the data has no class {self.positive!r}"
                    f"{nearest(self.positive, label_names)}; allowed: {choices(label_names)}"
                )
            return self.model_copy(update={"positive": label_names.index(self.positive)})
        if self.positive >= len(label_names):
            raise ConfigError(
                f"metric {self.label}: positive: got the index {self.positive}, but the data has the "
                f"{len(label_names)} classes {choices(label_names)}; use a name, or an index below {len(label_names)}"
            )
        return self


ENTRY = F1
