"""Files and hub datasets to blocks of rows. Every mistake in a file is reported with its line or row."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fedray.config import DataConfig
from fedray.data.examples import Block
from fedray.errors import DataError, choices, nearest
from fedray.types import SPLITS, Split

Columns = dict[str, Sequence[Any]]
FORMATS = (".jsonl", ".json", ".csv", ".parquet")
LARGEST = 10_000_000_000
"""Bytes of a file, and of what a Parquet file says that it unpacks to: all of it is read into memory."""


def read_file(path: Path, split: Split, file: str, task: str) -> Block:
    """Read one jsonl, JSON, CSV or Parquet file.

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
        return Block(str(path), split, file, task, columns, rows, unit="row")
    else:
        columns, rows = _json_lines(text, str(path))
    return Block(str(path), split, file, task, columns, rows)


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


def _parquet(path: Path, split: Split, file: str, task: str) -> Block:
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
    return Block(str(path), split, file, task, columns, range(1, table.num_rows + 1), unit="row")


def read_hub(data: DataConfig) -> list[Block]:
    """Read a dataset of the hub, or a local dataset folder; its code is never run.

    Raises:
        DataError: it cannot be reached or found, or lacks a split.
    """
    import datasets  # a second of imports that other sources do not need

    name = data.name or ""
    folder = Path(name).expanduser()
    try:
        if any((folder / marker).exists() for marker in ("dataset_dict.json", "state.json")):
            found = datasets.load_from_disk(str(folder))
        else:
            found = datasets.load_dataset(str(folder) if folder.is_dir() else name, data.config)
    except Exception as error:  # datasets, huggingface_hub, fsspec and pyarrow each raise their own kinds
        raise DataError(
            f"data.name: the dataset {name!r} could not be loaded: {' '.join(str(error).split())}. Without a "
            "connection to the hub, name a local dataset folder, use `source: files`, or set HF_HOME to a folder into "
            "which it was downloaded before"
        ) from error
    available = dict(found) if isinstance(found, dict) else {"train": found}
    wanted = data.splits or {split: split for split in SPLITS if split in available}
    if "train" not in wanted:
        raise DataError(f"data.splits: name the split of {name!r} that serves as train; it has: {choices(available)}")
    return [_hub_block(data, split, theirs, available) for split, theirs in wanted.items()]


def _hub_block(data: DataConfig, split: Split, theirs: str, available: dict[str, Any]) -> Block:
    name = data.name or ""
    if theirs not in available:
        raise DataError(
            f"data.splits.{split}: {name!r} has no split {theirs!r}{nearest(theirs, available)}; "
            f"it has: {choices(available)}"
        )
    dataset = available[theirs]
    columns: Columns = dataset.with_format("arrow")[:].to_pydict()
    for column, feature in dataset.features.items():
        if hasattr(feature, "int2str"):
            # The hub's convention for a split without labels is class -1.
            columns[column] = [feature.int2str(v) if v is not None and v >= 0 else None for v in columns[column]]
    task = data.config or Path(name).name
    return Block(f"{name}, split {theirs}", split, task, task, columns, range(1, dataset.num_rows + 1), unit="row")
