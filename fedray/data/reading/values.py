"""What a value of a row is: nothing, a text, or the name of a class."""

import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from fedray.config import RawRows
from fedray.errors import DataError, choices, nearest

WHOLE = re.compile(r"[+-]?[0-9]{1,300}(\.0*)?")
"""A whole number in plain decimal form."""
MISSING = ("NAType", "NaTType")
"""Classes of pandas' missing values."""
MISSING_WORDS = ("NaN", "NaT", "<NA>")
"""What missing values would be as text."""


def is_missing(value: Any) -> bool:
    """Return whether a value stands for nothing: None, NaN, NaT or NA."""
    if value is None or type(value).__name__ in MISSING:
        return True
    return isinstance(value, float | np.generic) and bool(value != value)


def as_text(value: Any) -> str:
    """Return any value of a row as text: nothing is empty, lists and mappings are JSON."""
    if isinstance(value, str):
        return value
    if is_missing(value):
        return ""
    if not isinstance(value, list | dict):
        return str(value)
    text = json.dumps(value, ensure_ascii=False, default=str)
    if any(word in text for word in MISSING_WORDS):
        text = json.dumps(_with_nulls(value), ensure_ascii=False, default=str)
    return text


def _with_nulls(value: Any) -> Any:
    """Return lists and mappings with None for what is missing: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _with_nulls(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_with_nulls(part) for part in value]
    return None if is_missing(value) else value


def class_name(value: Any) -> str | None:
    """Return the name of the class that a label names, None if it names none.

    Equal labels have equal names however a file writes them: blanks around a name do not count, nor does the way in
    which Unicode composes its letters, and `1`, `1.0` and `01` are the same number.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str):
        return _spelt(value) or None
    if isinstance(value, bool | int):
        return str(value)
    if isinstance(value, float | Decimal) and np.isfinite(float(value)) and value == int(value):
        return str(int(value))
    return None


@lru_cache(maxsize=100_000)
def _spelt(text: str) -> str:
    name = unicodedata.normalize("NFC", text.strip())
    return str(int(name.partition(".")[0])) if WHOLE.fullmatch(name) else name


def shown(value: Any) -> str:
    """Return a wrong value as a message shows it."""
    return "nothing" if is_missing(value) or value == "" else repr(value)[:80]


def text_array(values: Sequence[str], place: Callable[[int], str]) -> pa.Array:
    """Return strings as an Arrow array.

    Args:
        place: returns the place of a value, for the message.

    Raises:
        DataError: a value is no Unicode text: JSON may hold half a surrogate pair, which UTF-8 cannot.
    """
    try:
        return pa.array(values, pa.string())
    except UnicodeEncodeError as error:
        row = next(row for row, value in enumerate(values) if value == error.object)
        raise DataError(f"{place(row)}: not a Unicode text: {error.reason}") from None


def column_of(raw: RawRows, name: str, setting: str) -> Sequence[Any]:
    """Return a column of the rows.

    Args:
        setting: that names the column, for the message.

    Raises:
        DataError: no such column.
    """
    if name not in raw.columns and len(raw):
        known = list(raw.columns)
        raise DataError(
            f"{raw.where}: no column {name!r} ({setting}){nearest(name, known)}; its columns: {choices(known)}"
        )
    return raw.columns.get(name, ())
