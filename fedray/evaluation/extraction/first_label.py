"""The first label in the text: the commonsense tasks of LLM-Adapters (arXiv 2304.01933, commonsense_evaluate.py)."""

import re
from collections.abc import Iterable
from typing import Any, Final

from pydantic import field_validator

from fedray.evaluation.extraction_rule import ExtractionRule

TASKS: Final[tuple[tuple[str, ...], ...]] = (
    ("true", "false"),
    ("solution1", "solution2"),
    ("answer1", "answer2", "answer3", "answer4", "answer5"),
    ("ending1", "ending2", "ending3", "ending4"),
    ("option1", "option2"),
)
"""The labels of LLM-Adapters' tasks: BoolQ, PIQA, (SIQA, ARC, OpenBookQA), HellaSwag, WinoGrande."""


class FirstLabel(ExtractionRule):
    """The first occurrence of a label, anywhere in the text, in the same case.

    It may be within a word: "untrue" gives `true`, "True" gives no answer. In a generated text only the labels of the
    reference's task count: where the reference gives `answer2`, these are `answer1` to `answer5`.
    """

    name = "first_label"

    labels: tuple[str, ...] | None = None
    """The allowed labels; null: those of LLM-Adapters' eight commonsense tasks. Of two that begin at the same place the
    longer one is meant."""

    @field_validator("labels", mode="before")
    @classmethod
    def _are_texts(cls, value: Any) -> Any:
        given = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(label, bool) for label in given):
            raise ValueError('put labels in quotes, as in ["true", "false"]: YAML reads bare true, yes and on alike')
        if value is not None and (len(given) < 2 or "" in given or len(set(given)) < len(given)):
            raise ValueError(f"expected at least two different labels, got {value!r}")
        return value

    def extract(self, text: str) -> str | None:
        return _first(text, [label for task in self._tasks for label in task])

    def correct(self, text: str, expected: str) -> bool:
        task = next(task for task in self._tasks if expected in task)
        return _first(text, task) == expected

    @property
    def _tasks(self) -> tuple[tuple[str, ...], ...]:
        return TASKS if self.labels is None else (self.labels,)


def _first(text: str, labels: Iterable[str]) -> str | None:
    longest_first = sorted(labels, key=len, reverse=True)
    found = re.search("|".join(map(re.escape, longest_first)), text)
    return found and found[0]


ENTRY = FirstLabel
