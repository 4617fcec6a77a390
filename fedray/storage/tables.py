"""Tables of a run that grow by rows, one Parquet file each: appended rows are on disk when `append` returns.

A Parquet file cannot be appended to, and rewriting all of it after every round would make a run's time quadratic in its
rounds. The file of a large table is therefore rewritten only when the table has grown by an eighth, or in many small
steps, and that of a small one at most every half second. Until then, recent rows are in side files, each named after
the number of rows before its own: `clients.parquet`, `clients-000010000.arrow`. They are written in Arrow's format,
which takes a tenth of the time.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from itertools import chain
from pathlib import Path
from time import monotonic
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fedray.errors import StateError
from fedray.storage.paths import StoragePath

SIDE = ".arrow"
SMALL_ROWS = 10_000
REWRITE_S = 0.5
"""The file of a table of up to SMALL_ROWS rows is rewritten, which takes a few milliseconds, if it is older than this
many seconds."""
PART = 8
"""A large table's file is rewritten once 1 / PART of its rows have been added."""
MAX_SIDE_FILES = 64
"""Every table's file is rewritten once it has this many side files."""

READ_TRIES = 3
"""Attempts to read a table: a writing process may move rows from side files into the table's file meanwhile."""


class Table:
    """NAME.parquet in a folder, empty at first.

    Args:
        durable: whether appended rows survive a crash of the machine.
        arranged: returns the rows in the order that they have in the file.
    """

    def __init__(
        self,
        folder: StoragePath,
        name: str,
        durable: bool = True,
        arranged: Callable[[pa.Table], pa.Table] = lambda rows: rows,
    ):
        self._folder, self._name, self._durable, self._arranged = folder, name, durable, arranged
        self._rows = pa.table({})
        self._in_file = 0
        self._rewritten = -math.inf
        self._side_files: list[StoragePath] = []

    def load(self) -> None:
        """Load the rows that are on disk, and put them into one file.

        Raises:
            StateError: the rows cannot be read or written.
        """
        self._rows = read_table(self._folder, self._name)
        self._in_file = self._rows.num_rows
        self._side_files = [place for _, place in _side_files_of(self._folder, self._name)]
        self.compact()

    def rows(self) -> list[dict[str, Any]]:
        """Return all rows."""
        found: list[dict[str, Any]] = self._rows.to_pylist()
        return found

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows and write them; their columns may differ from those of earlier rows.

        Raises:
            StateError: the rows could not be written; all earlier rows are intact.
        """
        columns = dict.fromkeys(chain.from_iterable(rows))
        new = pa.table({column: [row.get(column) for row in rows] for column in columns})
        joined = _joined([self._rows, new])
        if joined.num_rows > SMALL_ROWS:
            due = joined.num_rows - self._in_file >= self._in_file / PART
        else:
            due = monotonic() - self._rewritten >= REWRITE_S
        if due or len(self._side_files) >= MAX_SIDE_FILES:
            self._write_all(joined)
        elif rows:
            place = self._folder / f"{self._name}-{self._rows.num_rows:09d}{SIDE}"
            buffer = BytesIO()
            with pa.ipc.new_file(buffer, new.schema) as file:
                file.write_table(new)
            place.write(buffer.getvalue(), self._durable)
            self._side_files.append(place)
            self._rows = joined

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Drop the rows that are not wanted; the next `append` removes them from disk.

        Raises:
            StateError: the rows on disk could not be put into one file first.
        """
        self.compact()
        self._rows = self._rows.filter(pa.array([wanted(row) for row in self.rows()], pa.bool_()))
        self._in_file, self._rewritten = 0, -math.inf  # the file is out of date: the next `append` rewrites it

    def compact(self) -> None:
        """Put all rows into the table's file, if some are in side files.

        Raises:
            StateError: the file cannot be written.
        """
        if self._side_files:
            self._write_all(self._rows)

    def _write_all(self, rows: pa.Table) -> None:
        """Rewrite the table's file, and then remove the side files. Until they are removed, readers recognise by the
        number of rows before theirs that the file already holds them."""
        rows = self._arranged(rows).combine_chunks()
        buffer = BytesIO()
        texts = [field.name for field in rows.schema if pa.types.is_string(field.type)]
        pq.write_table(rows, buffer, use_dictionary=texts)  # numbers differ from row to row
        (self._folder / f"{self._name}.parquet").write(buffer.getvalue(), self._durable)
        self._rows, self._in_file, self._rewritten = rows, rows.num_rows, monotonic()
        while self._side_files:
            self._side_files[-1].remove()
            self._side_files.pop()


def read_table(
    where: str | Path | StoragePath, name: str, wanted: Callable[[str], bool] = lambda column: True
) -> pa.Table:
    """Return a table of a run's folder with all its rows, even while the run continues or after it was killed.

    Args:
        wanted: whether a column is read.

    Returns:
        The table; without rows and columns if it does not exist.

    Raises:
        StateError: the table cannot be read.
        ConfigError: pyarrow does not support the URI.
    """
    folder = StoragePath.of(where)
    for _ in range(READ_TRIES - 1):
        with suppress(StateError):
            return _read_table(folder, name, wanted)
    return _read_table(folder, name, wanted)


def _read_table(folder: StoragePath, name: str, wanted: Callable[[str], bool]) -> pa.Table:
    side_files = _side_files_of(folder, name)  # listed first: rows that are compacted from now on are found in the file
    file = folder / f"{name}.parquet"
    with _failing(file):
        parts = [_read(file, wanted)] if file.is_file() else []
    have = sum(part.num_rows for part in parts)
    for before, place in side_files:
        if before < have:  # the file already holds these rows
            continue
        if before > have:
            raise StateError(f"{place}: cannot be read: only {have} of the {before} rows before its own exist")
        parts.append(_read(place, wanted))
        have += parts[-1].num_rows
    return _joined(parts) if parts else pa.table({})


def _read(place: StoragePath, wanted: Callable[[str], bool]) -> pa.Table:
    with _failing(place):
        blob = BytesIO(place.read())
        if place.path.endswith(SIDE):
            rows = pa.ipc.open_file(blob).read_all()
            return rows.select([column for column in rows.column_names if wanted(column)])
        file = pq.ParquetFile(blob)
        names = file.schema_arrow.names
        chosen = [column for column in names if wanted(column)]
        return file.read(None if chosen == names else chosen)


def _joined(parts: Sequence[pa.Table]) -> pa.Table:
    return pa.concat_tables(parts, promote_options="permissive")


def _side_files_of(folder: StoragePath, name: str) -> list[tuple[int, StoragePath]]:
    """Return the side files of a table in order, each with the number of rows before its first. Older versions wrote
    them in Parquet."""
    pattern = re.compile(rf"{re.escape(name)}-(\d{{9,}})\.(arrow|parquet)")
    with _failing(folder):
        names = folder.names()
    found = [(int(match[1]), folder / match[0]) for other in names if (match := pattern.fullmatch(other))]
    return sorted(found, key=lambda entry: entry[0])


@contextmanager
def _failing(place: StoragePath) -> Iterator[None]:
    """Name the file or folder in the message of an error."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise StateError(f"{place}: cannot be read: {error}") from None
