"""Reads files into raw rows: JSON lines, JSON, CSV, TSV and Parquet. Every mistake is reported with its line or row."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fedray.config import RawRows
from fedray.data.reading.csv_files import check_names, decoded, read_csv, read_tsv
from fedray.errors import DataError, choices, reason
from fedray.types import Role

Columns = dict[str, Sequence[Any]]
Clients = dict[str, list[Any]]
"""The rows of every client, by its name."""
FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
"""pyarrow's name of a compression by the suffix of its files."""
LARGEST = 10_000_000_000
"""Bytes of a file, and of what a compressed or Parquet file unpacks to: all of it is read into memory."""
CHUNK = 1 << 24
"""Bytes that are unpacked at once."""
SPLIT_NAMES = frozenset(
    ("train", "training", "dev", "val", "valid", "validation", "test", "testing", "eval", "evaluation")
)
"""Keys of a JSON object that name splits, and not clients."""


@dataclass(frozen=True)
class FileName:
    """The parts of a file's name: `train.jsonl.gz` is (train, .jsonl, .gz)."""

    stem: str
    format: str
    compression: str

    @classmethod
    def of(cls, path: Path) -> "FileName":
        compression = path.suffix.lower() if path.suffix.lower() in COMPRESSED else ""
        inner = Path(path.stem) if compression else path
        return cls(inner.stem, inner.suffix.lower(), compression)


def read_file(path: Path, split: Role, file: str, task: str) -> list[RawRows]:
    """Read one file.

    Args:
        path: the file; its suffixes say which kind it is, for example `.csv` or `.jsonl.gz`.
        split: to which its rows belong.
        file: natural client of its rows, unless the file itself names clients ({client: rows}).
        task: name of the task of its rows.

    Returns:
        All rows; those of every client that the file names apart.

    Raises:
        DataError: the file is missing, of another kind, too large, not UTF-8 or malformed.
    """
    name, where = FileName.of(path), str(path)
    if name.format not in FORMATS or (name.format == ".parquet" and name.compression):
        raise DataError(
            f"{path}: unknown kind of file {name.format + name.compression!r}; allowed: {choices(FORMATS)}; all but "
            f".parquet may be compressed: {choices(COMPRESSED)}"
        )
    if name.format == ".parquet":
        return [_parquet(path, split, file, task)]
    raw = _content(path, name.compression)
    if name.format in (".csv", ".tsv"):
        columns, rows = (read_csv if name.format == ".csv" else read_tsv)(raw, where)
        return [RawRows(where, columns, split, file, task, rows, unit="line")]
    text = decoded(raw, where)
    if name.format == ".json" and (found := _document(text, where, split)) is not None:
        return _tables(found, where, split, file, task)
    records, rows = _json_lines(text, where)
    return [RawRows(where, _columns(records, rows, where, "line"), split, file, task, rows, unit="line")]


def _tables(found: list[Any] | Clients, where: str, split: Role, file: str, task: str) -> list[RawRows]:
    """Return the rows of a JSON document, or those of each client. All clients have all columns."""
    if isinstance(found, list):
        rows = list(range(1, len(found) + 1))
        return [RawRows(where, _columns(found, rows, where, "row"), split, file, task, rows)]
    names: dict[str, None] = {}
    tables = {}
    for client, records in found.items():
        tables[client] = _columns(records, range(1, len(records) + 1), f"{where}: {client!r}", "row")
        names |= dict.fromkeys(tables[client])
    return [
        RawRows(
            f"{where}: {client!r}",
            {name: columns.get(name, [None] * len(found[client])) for name in names},
            split,
            client.strip(),
            task,
        )
        for client, columns in tables.items()
    ]


def _check_size(path: Path, size: int) -> None:
    if size > LARGEST:
        raise DataError(
            f"{path}: {size / 1e9:.3g} GB to read at once, at most {LARGEST / 1e9:g} GB; cut it into several files and "
            "name them with a `*`"
        )


def _content(path: Path, compression: str) -> bytes:
    """Return a file's bytes, unpacked."""
    try:
        _check_size(path, path.stat().st_size)
        if not compression:
            return path.read_bytes()
        content = bytearray()
        with pa.input_stream(str(path), compression=COMPRESSED[compression]) as stream:
            while chunk := stream.read(CHUNK):
                content += chunk
                _check_size(path, len(content))
        return bytes(content)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {reason(error)}") from None


def _json_lines(text: str, where: str) -> tuple[list[Any], list[int]]:
    records, rows = [], []
    # Not splitlines(): JSON strings may hold U+2028 and other breaks unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except (ValueError, RecursionError) as error:  # ValueError: a whole number of thousands of digits
                raise DataError(f"{where}: line {number}: not valid JSON: {error}") from None
            rows.append(number)
    return records, rows


def _document(text: str, where: str, split: Role) -> list[Any] | Clients | None:
    """Return the rows of a file that is one JSON value; None if it has a value per line.

    The value is an array of rows, an object that holds one, such as {"data": [...]}, an object with the rows of several
    clients, {client: rows}, or a single row.
    """
    start = text.lstrip()[:1]
    if start not in ("[", "{"):
        return None
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        if start == "{" and error.msg == "Extra data":  # further lines
            return None
        raise DataError(f"{where}: line {error.lineno}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON: {error}") from None
    if isinstance(document, list):
        return document
    tables = {key: value for key, value in document.items() if _is_table(value)}
    if not tables:
        return [document]
    if len(tables) == 1 or split in tables:
        found: list[Any] = tables[split] if split in tables else next(iter(tables.values()))
        return found
    if SPLIT_NAMES & set(document):
        raise DataError(
            f"{where}: an object with several lists of rows: {choices(map(repr, tables))}; expected one, or one named "
            f"{split!r}; save the rows as a file of their own"
        )
    for key, value in document.items():
        if key not in tables:
            came = "no rows" if value in ([], None) else f"{type(value).__name__}, not a list of rows"
            raise DataError(
                f"{where}: {key!r}: {came}; an object with several lists of rows, such as {next(iter(tables))!r}, has "
                "the rows of a client under every key: remove this one"
            )
        if not key.strip():
            raise DataError(f"{where}: {key!r}: a client without a name")
    return tables


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _columns(records: list[Any], rows: Sequence[int], where: str, unit: str) -> Columns:
    for row, record in zip(rows, records, strict=True):
        if not isinstance(record, dict):
            raise DataError(f"{where}: {unit} {row}: expected an object with columns, got {type(record).__name__}")
    names = dict.fromkeys(name for record in records for name in record)
    return {name: [record.get(name) for record in records] for name in names}


def _parquet(path: Path, split: Role, file: str, task: str) -> RawRows:
    try:
        _check_size(path, path.stat().st_size)
        with pq.ParquetFile(path) as opened:
            check_names(opened.schema_arrow.names, str(path))
            groups = range(opened.metadata.num_row_groups)
            _check_size(path, sum(opened.metadata.row_group(group).total_byte_size for group in groups))
            table = opened.read()
        columns = table.to_pydict()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {reason(error)}") from None
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a valid Parquet file: {error}") from None
    return RawRows(str(path), columns, split, file, task, range(1, table.num_rows + 1))
