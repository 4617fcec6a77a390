"""Examples before tokenisation: the common form of all sources, and the checks that locate a bad row."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from string import Formatter
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fedray.config import DataConfig, RawRows
from fedray.config.partition import IntArray
from fedray.errors import DataError, choices, nearest
from fedray.types import Task

MIN_CLASSES = 2


@dataclass(frozen=True)
class Examples:
    """Checked examples of all clients.

    Attributes:
        task: what is learned from the examples.
        table: `split`, `file` (natural client), `task` (task name), and `text`, `label` (string: class name; float64:
            regression), `text_pair` where there is one; or `prompt`, `answer` (causal_lm).
        columns: the source's own columns as strings, in the same rows as `table`.
        label_names: class names in the order of their indices, over all splits; empty without classes.
    """

    task: Task
    table: pa.Table
    columns: pa.Table
    label_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def take(self, rows: IntArray) -> "Examples":
        """Return the examples in these rows, in this order."""
        return Examples(self.task, self.table.take(rows), self.columns.take(rows), self.label_names)

    @property
    def column_names(self) -> list[str]:
        """Names of the source's own columns."""
        return list(self.columns.column_names)

    def field(self, name: str) -> npt.NDArray[np.str_]:
        """Return one column of `table` as an array of strings."""
        return _strings(self.table[name])

    def values(self, column: str) -> npt.NDArray[np.str_]:
        """Return one column as an array of strings: the source's own column of that name, else one of `table`.

        Raises:
            DataError: no such column.
        """
        for table in (self.columns, self.table):
            if column in table.column_names:
                return _strings(table[column])
        known = sorted({*self.columns.column_names, *self.table.column_names})
        raise DataError(f"no column {column!r}{nearest(column, known)}; the data has: {choices(known)}")

    @cached_property
    def digests(self) -> npt.NDArray[np.bytes_]:
        """A 16-byte digest of every row's content: bytes[rows]."""
        parts = [self.table[name].to_pylist() for name in sorted(self.table.column_names)]
        parts += [self.columns[name].to_pylist() for name in sorted(self.columns.column_names)]
        # Hexadecimal, because numpy's byte strings drop trailing zero bytes.
        rows = (hashlib.blake2b(repr(row).encode(), digest_size=16).hexdigest() for row in zip(*parts, strict=True))
        return np.asarray(list(rows), dtype="S32")


def _strings(column: pa.ChunkedArray) -> npt.NDArray[np.str_]:
    return np.asarray([str(value) for value in column.to_pylist()], dtype=np.str_)


def assemble(parts: Sequence[RawRows], data: DataConfig, task: Task) -> Examples:
    """Check every row of all parts and return them as one table.

    Raises:
        DataError: a column is missing, a text is empty, a label is missing or not of its kind, there is no example at
            all. The message names the file, the row and the column.
    """
    read = _causal if task == "causal_lm" else _labelled
    tables = []
    for raw in parts:
        fields = read(raw, data, task)
        size = len(raw)
        same = {"split": raw.split, "file": raw.file, "task": raw.task}
        tables.append(pa.table(fields | {name: pa.array([value] * size, pa.string()) for name, value in same.items()}))
    table = pa.concat_tables(tables).combine_chunks() if tables else None
    sources = choices(dict.fromkeys(raw.where for raw in parts))
    if table is None or table.num_rows == 0:
        raise DataError(f"no examples in {sources or 'the data'}")
    if "train" not in table["split"].unique().to_pylist():
        raise DataError(f"no training examples in {sources}: name the split that serves as train")
    return Examples(task, table, _own_columns(parts), _label_names(table, data, task, sources))


def parse_template(template: str, setting: str) -> list[tuple[str, str | None]]:
    """Return a template's parts: (literal text, column that follows it or None).

    Raises:
        DataError: unbalanced braces, or a field that is more than a column's name.
    """
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise DataError(f"{setting}: {template!r} is not a template: {error}; write {{{{ for a brace") from None
    for _, column, specification, conversion in parts:
        if column == "" or specification or conversion:
            raise DataError(f"{setting}: {template!r}: a field must be a column's name in braces, such as {{text}}")
    return [(literal, column) for literal, column, _, _ in parts]


def _labelled(raw: RawRows, data: DataConfig, task: Task) -> dict[str, pa.Array]:
    """Return text, label and, where configured, text_pair of these rows."""
    values = list(enumerate(_column(raw, data.label, "data.label")))
    if task == "regression":
        labels = pa.array([_number(value, raw, row, data.label) for row, value in values], pa.float64())
    else:
        labels = _array([_class_name(value, raw, row, data.label) for row, value in values], raw, data.label)
    fields = {"text": _texts(raw, data.text, "data.text"), "label": labels}
    if data.text_pair is not None:
        fields["text_pair"] = _texts(raw, data.text_pair, "data.text_pair")
    return fields


def _causal(raw: RawRows, data: DataConfig, task: Task) -> dict[str, pa.Array]:
    """Return prompt and answer of these rows, with the templates filled in."""
    prompts = _filled(raw, data.prompt, "data.prompt")
    answers = _filled(raw, data.answer, "data.answer")
    for row, answer in enumerate(answers):
        if not answer.strip():
            raise DataError(f"{raw.row(row)}: the answer {data.answer!r} is empty")
    return {"prompt": _array(prompts, raw, data.prompt), "answer": _array(answers, raw, data.answer)}


def _filled(raw: RawRows, template: str, setting: str) -> list[str]:
    parts = parse_template(template, setting)
    pieces: list[Sequence[str]] = []
    for literal, column in parts:
        pieces.append([literal] * len(raw))
        if column is not None:
            pieces.append([as_text(value) for value in _column(raw, column, setting)])
    return ["".join(row) for row in zip(*pieces, strict=True)] if pieces else [""] * len(raw)


def _column(raw: RawRows, name: str, setting: str) -> Sequence[Any]:
    if name not in raw.columns and len(raw):
        known = list(raw.columns)
        raise DataError(
            f"{raw.where}: no column {name!r} ({setting}){nearest(name, known)}; its columns: {choices(known)}"
        )
    return raw.columns.get(name, ())


def _texts(raw: RawRows, column: str, setting: str) -> pa.Array:
    values = _column(raw, column, setting)
    for row, value in enumerate(values):
        if not isinstance(value, str) or not value.strip():
            came = "nothing" if value is None else "an empty text" if isinstance(value, str) else repr(value)[:80]
            raise DataError(f"{raw.at(row, column)}: expected a text, got {came}")
    return _array(values, raw, column)


def _class_name(value: Any, raw: RawRows, row: int, column: str) -> str:
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, bool | int) or (isinstance(value, float) and value.is_integer()):
        return str(int(value) if isinstance(value, float) else value)
    came = "nothing" if value is None or value == "" else repr(value)[:80]
    raise DataError(
        f"{raw.at(row, column)}: expected a class name or a whole number, got {came}; for a split without labels "
        "name another one, for decimal numbers set `task: regression`"
    )


def _number(value: Any, raw: RawRows, row: int, column: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        came = "nothing" if value is None or value == "" else repr(value)[:80]
        raise DataError(f"{raw.at(row, column)}: expected a finite number (task regression), got {came}")
    return number


def as_text(value: Any) -> str:
    """Return any value of a row as text: nothing is empty, lists and mappings are JSON."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict) else str(value)


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
    """Return strings as an Arrow array; JSON may hold half a surrogate pair, which no UTF-8 text can."""
    try:
        return pa.array(values, pa.string())
    except UnicodeEncodeError as error:
        row = next(row for row, value in enumerate(values) if value == error.object)
        raise DataError(f"{raw.at(row, column)}: not a Unicode text: {error.reason}") from None


def _label_names(table: pa.Table, data: DataConfig, task: Task, sources: str) -> tuple[str, ...]:
    """Return the class names, sorted; as numbers where all are whole numbers."""
    if task != "classification":
        return ()
    names = table["label"].unique().to_pylist()
    if len(names) < MIN_CLASSES:
        raise DataError(f"{sources}: column {data.label!r} holds the single class {names[0]!r}; expected at least two")
    whole = all(name.lstrip("-").isascii() and name.lstrip("-").isdigit() for name in names)
    return tuple(sorted(names, key=lambda name: (int(name), name)) if whole else sorted(names))
