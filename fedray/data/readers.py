"""Reads files into raw rows: JSON lines, JSON, CSV and Parquet. Every mistake is reported with its line or row."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fedray.config import RawRows
from fedray.errors import DataError, choices
from fedray.types import Split

Columns = dict[str, Sequence[Any]]
FORMATS = (".jsonl", ".json", ".csv", ".parquet")
LARGEST = 10_000_000_000
"""Bytes of a file, and of what a Parquet file says that it unpacks to: all of it is read into memory."""


def read_file(path: Path, split: Split, file: str, task: str) -> RawRows:
    """Read one jsonl, JSON, CSV or Parquet file.

    Args:
        path: the file; its suffix says which kind it is.
        split: to which its rows belong.
        file: natural client of its rows.
        task: name of the task of its rows.

    Raises:
        DataError: the file is missing, of another kind, too large, not UTF-8 or malformed.
    """
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise DataError(f"{path}: unknown kind of file {suffix!r}; allowed: {choices(FORMATS)}")
    if suffix == ".parquet":
        return _parquet(path, split, file, task)
    text = _text(path)
    if suffix == ".csv":
        columns, rows = _csv(text, str(path))
    elif suffix == ".json" and text.lstrip().startswith("["):
        columns, rows = _json_array(text, str(path))
        return RawRows(str(path), columns, split, file, task, rows)
    else:
        columns, rows = _json_lines(text, str(path))
    return RawRows(str(path), columns, split, file, task, rows, unit="line")


def _check_size(path: Path, size: int) -> None:
    if size > LARGEST:
        raise DataError(
            f"{path}: {size / 1e9:.3g} GB to read at once, at most {LARGEST / 1e9:g} GB; cut it into several files and "
            "name them with a `*`"
        )


def _text(path: Path) -> str:
    try:
        _check_size(path, path.stat().st_size)
        raw = path.read_bytes()
        return raw.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}: line {line}: not UTF-8: {error.reason}; save the file as UTF-8") from None


def _csv(text: str, where: str) -> tuple[Columns, list[int]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    records: list[list[str]] = []
    rows: list[int] = []
    start = 1
    try:
        for record in reader:
            if not header:
                header = record
                if len(set(header)) < len(header):
                    raise DataError(f"{where}: line 1: a column's name occurs twice: {choices(header)}")
            elif record:
                if len(record) != len(header):
                    raise DataError(f"{where}: line {start}: {len(record)} fields, but the header has {len(header)}")
                records.append(record)
                rows.append(start)
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{where}: line {start}: not valid CSV: {error}") from None
    columns: Columns = {name: [record[i] for record in records] for i, name in enumerate(header)}
    return columns, rows


def _json_lines(text: str, where: str) -> tuple[Columns, list[int]]:
    records, rows = [], []
    # Not splitlines(): JSON strings may hold U+2028 and other breaks unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except (ValueError, RecursionError) as error:  # ValueError: a whole number of thousands of digits
                raise DataError(f"{where}: line {number}: not valid JSON: {error}") from None
            rows.append(number)
    return _columns(records, rows, where, "line"), rows


def _json_array(text: str, where: str) -> tuple[Columns, list[int]]:
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: line {error.lineno}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON: {error}") from None
    rows = list(range(1, len(records) + 1))
    return _columns(records, rows, where, "row"), rows


def _columns(records: list[Any], rows: list[int], where: str, unit: str) -> Columns:
    for row, record in zip(rows, records, strict=True):
        if not isinstance(record, dict):
            raise DataError(f"{where}: {unit} {row}: expected an object with columns, got {type(record).__name__}")
    names = dict.fromkeys(name for record in records for name in record)
    return {name: [record.get(name) for record in records] for name in names}


def _parquet(path: Path, split: Split, file: str, task: str) -> RawRows:
    try:
        _check_size(path, path.stat().st_size)
        with pq.ParquetFile(path) as opened:
            groups = range(opened.metadata.num_row_groups)
            _check_size(path, sum(opened.metadata.row_group(group).total_byte_size for group in groups))
            table = opened.read()
        columns = table.to_pydict()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a valid Parquet file: {error}") from None
    return RawRows(str(path), columns, split, file, task, range(1, table.num_rows + 1))
