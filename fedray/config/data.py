"""The section `data`: what all data sources have in common, and what a source implements.

A source is a subclass of `DataConfig` with configuration fields of its own and the method `load`. Built-in sources are
the modules of `fedray.data.sources`, found by the field `source`; a user's own is given by the field `class`.
"""

import os
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator, model_validator

from fedray.config.registry import Registry
from fedray.config.section import PositiveInt, Section, absolute
from fedray.errors import DataError, choices, nearest
from fedray.types import ROLES, Role, Task


@dataclass(frozen=True)
class RawRows:
    """Unchecked rows that share a file, a split and a task.

    Attributes:
        where: name in messages: a path, or what stands for one.
        columns: value of every row by name of the column, all of the same length; None where a row lacks it.
        split: part of the data to which the rows belong; `common` for test examples that belong to no client.
        file: natural client for the partition `by_file`.
        task: name of the task for the partitions `distinct_task` and `mixed_task`.
        rows: number of every row in messages; default 1, 2, 3, ...
        unit: what is counted by `rows`, for example `line`.
        test_set: name of the test set to which the rows belong, where a source has several; each is scored apart, too.
    """

    where: str
    columns: Mapping[str, Sequence[Any]]
    split: Role = "train"
    file: str = "all"
    task: str = "all"
    rows: Sequence[int] | None = None
    unit: str = "row"
    test_set: str = ""

    def __post_init__(self) -> None:
        if self.split not in ROLES:
            wrong = f"{self.split!r}{nearest(self.split, ROLES)}"
            raise DataError(f"{self.where}: unknown split {wrong}; allowed: {choices(ROLES)}")
        for name, values in self.columns.items():
            if len(values) != len(self):
                first = "rows" if self.rows is not None else repr(next(iter(self.columns)))
                raise DataError(f"{self.where}: column {name!r} has {len(values)} values, but {first} has {len(self)}")

    def __len__(self) -> int:
        return len(self.rows) if self.rows is not None else len(next(iter(self.columns.values()), ()))

    @property
    def numbers(self) -> Sequence[int]:
        """The number of every row in messages."""
        return self.rows if self.rows is not None else range(1, len(self) + 1)

    def row(self, index: int) -> str:
        """Return the place of a row, for a message."""
        return f"{self.where}: {self.unit} {self.numbers[index]}"

    def at(self, index: int, column: str) -> str:
        """Return the place of a value, for a message."""
        return f"{self.row(index)}: column {column!r}"


FormatName = Literal["prompt_completion", "alpaca", "sharegpt", "messages"]
PROMPT, ANSWER = "{prompt}", "{answer}"
MIN_CHOICES = 2


class DataConfig(Section):
    """The common fields of all data sources, and their contract."""

    group_column: ClassVar[str | None] = None
    """Column with the number of the planted group of clients, in sources that plant groups: results are compared with
    it, nothing is trained on it."""

    source: str | None = None
    """Name of a built-in source: where examples come from."""
    class_: str | None = Field(default=None, alias="class")
    """`module.Class` of a source of your own, instead of `source`."""
    text: str = "text"
    """Column with the (first) text of a classification or regression example."""
    text_pair: str | None = None
    """Column with the second text of a sentence pair."""
    label: str = "label"
    """Column with the label (class name or number; a number for regression)."""
    prompt: str = PROMPT
    """causal_lm: template of what the model reads, with {column} fields; no loss here. {column?} may be missing or
    empty, and {column?:TEXT} is TEXT where the column is not empty, and nothing otherwise; TEXT may have fields. The
    prompt of Alpaca: "{instruction}{input?:\\n\\n### Input:\\n{input}}\\n\\n### Response:\\n"."""
    answer: str = ANSWER
    """causal_lm: template of what it must continue with; the loss is taken here (and on the end-of-text token)."""
    choices: str | tuple[str, ...] | None = None
    """causal_lm: what an example's options are, for metrics that rank them: templates as in `prompt`, or the name of a
    column with a list of texts, or with {text: [...], label: [...]}. The right one is the option that equals `answer`,
    or has it as its label; blanks around an option do not count, and all options get those of `answer`."""
    choice_labels: tuple[str, ...] | None = None
    """causal_lm: what `answer` calls the options, in their order, where it is neither their text nor a label that comes
    with them: [A, B, C, D], or [0, 1] for their indices. The text of the right option is what is learned."""
    format: FormatName | None = None
    """causal_lm: how instruction data is written, instead of `prompt` and `answer`. Default: detected from the columns
    if they are those of one format and `prompt` and `answer` are left out."""
    chat_template: str | None = None
    """How conversations become text: `chatml`, `plain`, a Jinja template, or the path of a file with one, which is read
    when the configuration is. Default: the tokenizer's own."""
    max_length: Annotated[int, Field(ge=4, le=1_000_000)] = 128
    """Longest example in tokens; longer ones are cut at the end (causal_lm: what precedes the last answer is cut from
    its start, down to a quarter of this, then the answer at its end)."""
    max_examples: PositiveInt | None = None
    """Keep at most this many training examples, drawn by seed."""
    max_test_examples: PositiveInt | None = None
    """Keep at most this many examples of a test split that the source itself has, and of its common test set, drawn by
    seed."""
    max_validation_examples: PositiveInt | None = None
    """Keep at most this many examples of a validation split that the source itself has, drawn by seed."""
    max_per_class: PositiveInt | None = None
    """Keep at most this many training examples per class, drawn by seed."""
    cache_dir: str = "~/.cache/fedray"
    """Where tokenised data is kept, by content."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return SOURCES.named(cls, value)

    @field_validator("chat_template")
    @classmethod
    def _read_template(cls, value: str | None) -> str | None:
        """Return a file's content instead of its path: the configuration is complete, wherever it is used."""
        if value is None or "{" in value or not os.path.isfile(path := os.path.expanduser(value)):
            return value
        try:
            return Path(path).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{value} cannot be read: {error}") from None

    @field_validator("choices")
    @classmethod
    def _several_choices(cls, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if isinstance(value, tuple) and len(value) < MIN_CHOICES:
            raise ValueError(f"expected the name of a column, or at least {MIN_CHOICES} templates, got {list(value)}")
        return value

    @field_validator("choice_labels", mode="before")
    @classmethod
    def _labels_as_texts(cls, value: Any) -> Any:
        """Read numbers as templates write them."""
        if not isinstance(value, list | tuple):
            return value
        return [str(label) if isinstance(label, int) else label for label in value]

    @model_validator(mode="after")
    def _one_way_to_read(self) -> Self:
        if self.format is not None and not self.default_templates:
            raise ValueError(
                f"format: {self.format!r} has columns of its own; leave out either format, or prompt and answer"
            )
        return self

    @property
    def default_templates(self) -> bool:
        """Whether neither `prompt` nor `answer` was changed."""
        return (self.prompt, self.answer) == (PROMPT, ANSWER)

    def with_absolute_paths(self, folder: Path) -> Self:
        """Return this section with absolute paths; relative ones are below `folder`. A source with paths of its own
        changes them, too, so that they mean the same in every process."""
        return self.model_copy(update={"cache_dir": absolute(self.cache_dir, folder)})

    @property
    def sections_by_path(self) -> Mapping[str, "DataConfig"]:
        """The sections that say how rows are read and limited, by where messages name them: only this one, as `data`,
        in sources without parts."""
        return {"data": self}

    def path_of(self, task: str) -> str:
        """Return where in `sections_by_path` the section of a task's rows is."""
        return "data"

    @abstractmethod
    def load(self, task: Task, seed: int, num_clients: int | None) -> Iterable[RawRows]:
        """Return all rows of the source. Reading columns, checking rows, limits and tokenisation are common to all
        sources and happen afterwards.

        Args:
            task: what is learned from the rows.
            seed: of the experiment; random draws use `fedray.randomness.keyed_rng(seed, purpose, ...)`.
            num_clients: `clients.count`, for sources that make as many clients as are asked for.

        Raises:
            DataError: the source cannot be found or read; the message says where and what to change.
        """


SOURCES = Registry("data source", "fedray.data.sources", DataConfig, key="source")  # type: ignore[type-abstract]
AnySource = Annotated[SerializeAsAny[DataConfig], BeforeValidator(SOURCES.parse)]
"""A configured source of any class."""
