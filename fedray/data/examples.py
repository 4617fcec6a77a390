"""Examples before tokenisation: the common form of all sources, and the checks that locate a bad row."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from fedray.config import DataConfig, RawRows
from fedray.config.partition import IntArray
from fedray.data.formats.instructions import Instructions
from fedray.data.reading.choices import with_choices
from fedray.data.reading.templates import filled
from fedray.data.reading.values import as_text, class_name, column_of, shown, text_array
from fedray.errors import DataError, choices, nearest
from fedray.types import SPLITS, Task

MIN_CLASSES = 2
UNLABELLED = -1
"""The label that public data sets give to examples whose labels are kept secret."""
LEAVE_OUT = (
    "-1 usually marks a split whose labels are not published: leave the split out, and it is taken from each client's "
    "training examples, or name another one"
)
ADD = (
    "leave these rows out, add training examples of their classes, or leave the split out: it is then taken from each "
    "client's training examples"
)


@dataclass(frozen=True)
class Examples:
    """Checked examples of all clients.

    Attributes:
        task: what is learned from the examples.
        table: `split` (or `common`), `file` (natural client), `task` (task name), `test_set` where the source names
            some, and `text`, `label` (string: class name; float64:
            regression), `text_pair` where there is one; or, for causal_lm, `prompt`, `answer`, or for conversations
            `turns` (JSON), `context` (number of leading turns without loss), `answer` (the last turn). With
            `data.choices` also `choices` (list<string>, what may follow the prompt) and `right` (index of the answer).
        columns: the source's own columns as strings, in the same rows as `table`.
        origins: int [rows, 2], each row's index in `sources` and its number there.
        sources: what was read, for messages, for example `train.csv: line`.
        label_column: the source's own column that names the classes; None without classes.
        label_names: class names in the order of their indices; empty without classes.
    """

    task: Task
    table: pa.Table
    columns: pa.Table
    origins: IntArray
    sources: tuple[str, ...]
    label_column: str | None = None
    label_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def take(self, rows: IntArray) -> "Examples":
        """Return the examples in these rows, in this order."""
        return replace(self, table=self.table.take(rows), columns=self.columns.take(rows), origins=self.origins[rows])

    def place(self, row: int) -> str:
        """Return the place of a row in its source, for a message."""
        source, number = self.origins[row]
        return f"{self.sources[source]} {number}"

    @cached_property
    def groups(self) -> npt.NDArray[np.str_]:
        """The group of every row that is scored apart: its test set where it has one, its task otherwise."""
        tasks = self.field("task")
        if "test_set" not in self.table.column_names:
            return tasks
        named = self.field("test_set")
        return np.where(named == "", tasks, named)

    @property
    def conversations(self) -> bool:
        """Whether the examples are conversations, which a chat template renders."""
        return "turns" in self.table.column_names

    @property
    def column_names(self) -> list[str]:
        """Names of the source's own columns."""
        return list(self.columns.column_names)

    def field(self, name: str) -> npt.NDArray[np.str_]:
        """Return one column of `table` as an array of strings."""
        return _strings(self.table[name])

    def values(self, column: str) -> npt.NDArray[np.str_]:
        """Return one column as an array of strings: the source's own column of that name, else one of `table`.

        Blanks around a value do not count, a missing value is empty, and the column of the labels has class names.

        Raises:
            DataError: no such column.
        """
        if column == self.label_column:
            return self.field("label")
        for table in (self.columns, self.table):
            if column in table.column_names:
                return np.char.strip(_strings(table[column]))
        known = sorted({*self.columns.column_names, *self.table.column_names})
        raise DataError(f"no column {column!r}{nearest(column, known)}; the data has: {choices(known)}")

    @cached_property
    def digests(self) -> npt.NDArray[np.bytes_]:
        """A 16-byte digest of every row's content: bytes[rows]. What is drawn by it does not depend on options."""
        names = sorted(set(self.table.column_names) - {"choices", "right"})
        parts = [self.table[name].to_pylist() for name in names]
        parts += [self.columns[name].to_pylist() for name in sorted(self.columns.column_names)]
        # Hexadecimal, because numpy's byte strings drop trailing zero bytes.
        rows = (hashlib.blake2b(repr(row).encode(), digest_size=16).hexdigest() for row in zip(*parts, strict=True))
        return np.asarray(list(rows), dtype="S32")


def _strings(column: pa.ChunkedArray) -> npt.NDArray[np.str_]:
    return np.asarray([str(value) for value in column.to_pylist()], dtype=np.str_)


def assemble(
    parts: Sequence[RawRows],
    data: DataConfig,
    task: Task,
    instructions: Mapping[str, Instructions] | None = None,
    label_names: Sequence[str] = (),
) -> Examples:
    """Check every row of all parts and return them as one table.

    Args:
        instructions: format of instruction data, by the path of a section (`DataConfig.sections_by_path`); sections
            without one name columns.
        label_names: the classes, where they are known; by default those of the training examples.

    Raises:
        DataError: a column is missing, a text is empty, a label is missing, not of its kind or without training
            examples, there is no example at all. The message names the file, the row and the column.
    """
    read = _causal if task == "causal_lm" else _labelled
    sections = data.sections_by_path
    tables = []
    for raw in parts:
        path = data.path_of(raw.task)
        layout = (instructions or {}).get(path)
        fields = read(raw, sections[path], path, task) if layout is None else layout.fields(raw)
        if sections[path].choices is not None:
            fields = with_choices(fields, raw, sections[path], path)
        size = len(raw)
        same = {"split": raw.split, "file": raw.file, "task": raw.task}
        tables.append(pa.table(fields | {name: pa.array([value] * size, pa.string()) for name, value in same.items()}))
    if any(raw.test_set for raw in parts):
        tables = [
            table.append_column("test_set", pa.array([raw.test_set] * len(raw), pa.string()))
            for table, raw in zip(tables, parts, strict=True)
        ]
    _check_forms(parts, tables)
    table = pa.concat_tables(tables).combine_chunks() if tables else None
    sources = choices(dict.fromkeys(raw.where for raw in parts))
    if table is None or table.num_rows == 0:
        raise DataError(f"no examples in {sources or 'the data'}")
    if "train" not in table["split"].unique().to_pylist():
        raise DataError(f"no training examples in {sources}: name the split that serves as train")
    origins = [np.stack([np.full(len(raw), part), raw.numbers], axis=1) for part, raw in enumerate(parts)]
    examples = Examples(
        task, table, _own_columns(parts), np.concatenate(origins), tuple(f"{raw.where}: {raw.unit}" for raw in parts)
    )
    if task == "regression":
        _check_scores(examples, data)
    if task != "classification":
        return examples
    names = _label_names(examples, data, sources, label_names)
    label_columns = {sections[data.path_of(raw.task)].label for raw in parts}
    label_column = label_columns.pop() if len(label_columns) == 1 else None
    return replace(
        examples, label_column=label_column if label_column in examples.column_names else None, label_names=names
    )


def rows_by_section(examples: Examples, data: DataConfig) -> dict[str, IntArray]:
    """Return the rows that are read by each section of `DataConfig.sections_by_path`."""
    tasks, of_row = np.unique(examples.field("task"), return_inverse=True)
    paths = np.asarray([data.path_of(task) for task in tasks])[of_row]
    return {path: np.flatnonzero(paths == path) for path in data.sections_by_path}


def _check_forms(parts: Sequence[RawRows], tables: Sequence[pa.Table]) -> None:
    """Refuse single texts among pairs, and conversations among prompts and answers.

    Raises:
        DataError: the message names the first two that differ.
    """
    filled = [(raw, _form(table)) for raw, table in zip(parts, tables, strict=True) if len(raw)]
    for raw, form in filled:
        if form != filled[0][1]:
            raise DataError(
                f"{raw.where}: {form}, but {filled[0][0].where} has {filled[0][1]}; an experiment has examples of one "
                "form"
            )


def _form(table: pa.Table) -> str:
    if "turns" in table.column_names:
        return "conversations"
    if "prompt" in table.column_names:
        return "prompts and answers as texts"
    return "pairs of texts (text_pair)" if "text_pair" in table.column_names else "single texts (no text_pair)"


def _labelled(raw: RawRows, data: DataConfig, path: str, task: Task) -> dict[str, pa.Array]:
    """Return text, label and, where configured, text_pair of these rows.

    Args:
        data: the section that names the columns.
        path: where it is, for messages.
    """
    values = list(enumerate(column_of(raw, data.label, f"{path}.label")))
    if task == "regression":
        labels = pa.array([_number(value, raw, row, data.label) for row, value in values], pa.float64())
    else:
        labels = _array([_class(value, raw, row, data.label) for row, value in values], raw, data.label)
    fields = {"text": _texts(raw, data.text, f"{path}.text"), "label": labels}
    if data.text_pair is not None:
        fields["text_pair"] = _texts(raw, data.text_pair, f"{path}.text_pair")
    return fields


def _causal(raw: RawRows, data: DataConfig, path: str, task: Task) -> dict[str, pa.Array]:
    """Return prompt and answer of these rows, with the templates filled in."""
    prompts = filled(raw, data.prompt, f"{path}.prompt")
    answers = filled(raw, data.answer, f"{path}.answer")
    for row, answer in enumerate(answers):
        if not answer.strip():
            raise DataError(f"{raw.row(row)}: the answer {data.answer!r} is empty")
    return {"prompt": _array(prompts, raw, data.prompt), "answer": _array(answers, raw, data.answer)}


def _texts(raw: RawRows, column: str, setting: str) -> pa.Array:
    values = column_of(raw, column, setting)
    for row, value in enumerate(values):
        if not isinstance(value, str) or not value.strip():
            came = "an empty text" if isinstance(value, str) else shown(value)
            raise DataError(f"{raw.at(row, column)}: expected a text, got {came}")
    return _array(values, raw, column)


def _class(value: Any, raw: RawRows, row: int, column: str) -> str:
    name = class_name(value)
    if name is None:
        raise DataError(
            f"{raw.at(row, column)}: expected a class name or a whole number, got {shown(value)}; for a split without "
            "labels name another one, for decimal numbers set `task: regression`"
        )
    return name


def _number(value: Any, raw: RawRows, row: int, column: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{raw.at(row, column)}: expected a finite number (task regression), got {shown(value)}")
    return number


def _own_columns(parts: Sequence[RawRows]) -> pa.Table:
    """Return the source's own columns as strings; empty where a part lacks a column."""
    names = dict.fromkeys(name for raw in parts for name in raw.columns)
    tables = []
    for raw in parts:
        lacking = [None] * len(raw)
        texts = {name: [as_text(value) for value in raw.columns.get(name, lacking)] for name in names}
        tables.append(pa.table({name: _array(values, raw, name) for name, values in texts.items()}))
    return pa.concat_tables(tables).combine_chunks()


def _array(values: Sequence[str], raw: RawRows, column: str) -> pa.Array:
    return text_array(values, lambda row: raw.at(row, column))


def _label_names(examples: Examples, data: DataConfig, sources: str, known: Sequence[str]) -> tuple[str, ...]:
    """Return the class names of the training examples, sorted; as numbers where all are whole numbers.

    Args:
        known: are returned instead, if there are any.

    Raises:
        DataError: there is a single class, another split has classes that training lacks, or there are classes that are
            not known.
    """
    if known:
        unknown = np.flatnonzero(~pc.is_in(examples.table["label"], value_set=pa.array(known)).to_numpy())
        if len(unknown):
            label = str(examples.field("label")[unknown[0]])
            raise DataError(
                f"{examples.place(int(unknown[0]))}: column {_label_of(examples, int(unknown[0]), data)!r}: the model "
                f"knows no class {label!r}{nearest(label, known)}; it knows {choices(map(repr, known))}"
            )
        return tuple(known)
    training = pc.equal(examples.table["split"], "train")
    names = examples.table["label"].filter(training).unique().to_pylist()
    if len(names) < MIN_CLASSES:
        label = _label_of(examples, 0, data)
        raise DataError(f"{sources}: column {label!r} holds the single class {names[0]!r}; expected at least two")
    whole = all(name.lstrip("-").isascii() and name.lstrip("-").isdigit() for name in names)
    names = sorted(names, key=lambda name: (int(name), name)) if whole else sorted(names)
    unseen = np.flatnonzero(~pc.is_in(examples.table["label"], value_set=pa.array(names)).to_numpy())
    if len(unseen):
        new = examples.table["label"].take(unseen).unique().to_pylist()
        first = int(unseen[0])
        near, advice = ("", LEAVE_OUT) if str(UNLABELLED) in new else (nearest(new[0], names), ADD)
        raise DataError(
            f"{examples.place(first)}: column {_label_of(examples, first, data)!r}: {len(unseen)} examples have "
            f"classes that no training example has: {choices(map(repr, new))}{near}; classes of the training examples: "
            f"{choices(map(repr, names))}; {advice}"
        )
    return tuple(names)


def _label_of(examples: Examples, row: int, data: DataConfig) -> str:
    """Return the column from which a row's label comes."""
    return data.sections_by_path[data.path_of(examples.field("task")[row])].label


def _check_scores(examples: Examples, data: DataConfig) -> None:
    """Refuse a split whose labels are all -1, below every training label."""
    labels, split = examples.table["label"].to_numpy(), examples.field("split")
    if labels[split == "train"].min() <= UNLABELLED:
        return
    for name in SPLITS[1:]:
        rows = np.flatnonzero(split == name)
        if len(rows) and (labels[rows] == UNLABELLED).all():
            column = _label_of(examples, rows[0], data)
            raise DataError(
                f"{examples.place(rows[0])}: column {column!r}: every label of the {name} split is -1, which is below "
                f"every training label; {LEAVE_OUT}"
            )
