"""Instruction data: which format the columns have, and rows of it as fields of examples."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import pyarrow as pa

from fedray.config import DataConfig, RawRows
from fedray.data.formats import alpaca, messages, prompt_completion, sharegpt
from fedray.data.formats.turns import Chat, Format, Pair
from fedray.data.reading.values import text_array
from fedray.errors import DataError, choices, nearest

FORMATS: dict[str, Format] = {
    "messages": messages.FORMAT,
    "sharegpt": sharegpt.FORMAT,
    "alpaca": alpaca.FORMAT,
    "prompt_completion": prompt_completion.FORMAT,
}
CONVERSATIONAL = ("system", "history", "tools", "functions")
"""Columns that data sets have beside a conversation, and that change what the model reads."""


@dataclass(frozen=True)
class Instructions:
    """The format of a data set.

    Attributes:
        name: as in `data.format`.
        detected: whether the columns alone say so.
        chat: whether there is a chat template.
        path: where the section is that configures it, for messages.
    """

    name: str
    detected: bool
    chat: bool
    path: str = "data"

    def notes(self, columns: Collection[str]) -> tuple[str, ...]:
        """Return what was detected, and which of the data's columns look like a part of a conversation, but are not
        read."""
        layout, notes = FORMATS[self.name], []
        if self.detected:
            notes.append(
                f"{self._part}instruction data in the format {self.name!r}, detected from {_named(layout.columns)}; "
                f"{self.path}.format names another one, {self.path}.prompt and {self.path}.answer read other columns"
            )
        read = {*layout.columns, *(layout.optional if self.chat else set(layout.optional) - {"system"})}
        if unread := [name for name in CONVERSATIONAL if name in columns and name not in read]:
            notes.append(f"{self.path}.format {self.name!r} does not read {_named(unread)}")
        return tuple(notes)

    @property
    def _part(self) -> str:
        return "" if self.path == "data" else f"{self.path}: "

    def fields(self, raw: RawRows) -> dict[str, pa.Array]:
        """Return `prompt` and `answer` of these rows; or, for conversations, `turns` (JSON), `context`, and as
        `answer` the last turn.

        Raises:
            DataError: a row is not written in this format; the message says where.
        """
        found = [self._read(raw, row) for row in range(len(raw))]
        if all(isinstance(one, Pair) for one in found):
            pairs = [one for one in found if isinstance(one, Pair)]
            prompts, answers = [one.prompt for one in pairs], [one.answer for one in pairs]
            return {"prompt": text_array(prompts, raw.row), "answer": text_array(answers, raw.row)}
        chats = [one for one in found if isinstance(one, Chat)]
        if len(chats) < len(found):
            row = next(row for row, one in enumerate(found) if type(one) is not type(found[0]))
            raise DataError(f"{raw.row(row)}: earlier rows are {_kind(found[0])}, this one is {_kind(found[row])}")
        return {
            "turns": text_array([json.dumps(one.turns, ensure_ascii=False, default=str) for one in chats], raw.row),
            "context": pa.array([one.context for one in chats], pa.int32()),
            "answer": text_array([one.turns[-1]["content"] for one in chats], raw.row),
        }

    def _read(self, raw: RawRows, row: int) -> Chat | Pair:
        layout = FORMATS[self.name]
        names = [*layout.columns, *(name for name in layout.optional if name in raw.columns)]
        try:
            return layout.read({name: raw.columns[name][row] for name in names}, self.chat)
        except ValueError as error:
            raise DataError(f"{raw.row(row)}: {self.path}.format {self.name!r}: {error}") from None


def find_instructions(parts: Sequence[RawRows], data: DataConfig, chat: bool) -> dict[str, Instructions]:
    """Return the format of each section's rows, by the section's path (`DataConfig.sections_by_path`): the configured
    one, or the one that all its rows' columns have. Sections whose templates make prompts and answers have none.

    Args:
        chat: whether there is a chat template.

    Raises:
        DataError: the columns are not those of the configured format, or are those of several.
    """
    found = {}
    for path, section in data.sections_by_path.items():
        filled = [raw for raw in parts if len(raw) and data.path_of(raw.task) == path]
        if (layout := _format_of(filled, section, path, chat)) is not None:
            found[path] = layout
    return found


def _format_of(filled: Sequence[RawRows], data: DataConfig, path: str, chat: bool) -> Instructions | None:
    if data.format is not None:
        for raw in filled:
            _check_columns(raw, data.format, path)
        return Instructions(data.format, False, chat, path)
    if not filled or not data.default_templates:
        return None
    shared = set.intersection(*(set(raw.columns) for raw in filled))
    if {"prompt", "answer"} <= shared:
        return None
    fitting = [name for name, layout in FORMATS.items() if shared >= set(layout.columns)]
    if len(fitting) > 1:
        raise DataError(
            f"{filled[0].where}: the columns are those of several formats of instruction data: {choices(fitting)}; "
            f"name one as {path}.format, or set {path}.prompt and {path}.answer; columns: {choices(sorted(shared))}"
        )
    return Instructions(fitting[0], True, chat, path) if fitting else None


def _check_columns(raw: RawRows, name: str, path: str) -> None:
    columns = FORMATS[name].columns
    for column in columns:
        if column not in raw.columns:
            known = list(raw.columns)
            fitting = [other for other, layout in FORMATS.items() if set(layout.columns) <= set(known)]
            hint = f"; the columns are those of {choices(fitting)}" if fitting else ""
            raise DataError(
                f"{raw.where}: {path}.format {name!r} reads {_named(columns)}, but there is no column {column!r}"
                f"{nearest(column, known)}; its columns: {choices(known)}{hint}"
            )


def _named(columns: Sequence[str]) -> str:
    return f"the column{'s' * (len(columns) > 1)} {' and '.join(map(repr, columns))}"


def _kind(found: Chat | Pair) -> str:
    return "a text" if isinstance(found, Pair) else "a list of turns"
