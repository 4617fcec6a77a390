"""Tables of a run that grow by rows, a Parquet file each: what was appended is on disk when `append` returns.

A Parquet file cannot be appended to, and to write all of it after every round would make a run's time quadratic in its
rounds. So the file of a large table is written anew only when the table has grown by an eighth, or in many small steps.
Until then new rows lie in files beside it, each named after the number of rows before its own: `clients.parquet`,
`clients-000010000.parquet`.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fedray.errors import StateError
from fedray.storage.paths import StoragePath

SMALL_ROWS = 10_000
"""A table of so many rows is one file at any time: it is written in some milliseconds."""
PART = 8
MOST_BESIDE = 64
"""A large table's file is written anew once 1 / PART of its rows have been added, or so many files lie beside it."""

READ_TRIES = 3
"""A process that writes may put rows into the file, and remove those beside it, while they are read."""


class Table:
    """NAME.parquet in a folder, empty at first.

    durable: whether what was appended survives a crash of the machine. arranged: puts the rows into the order in which
    they shall stand in the file.
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
        self._beside: list[StoragePath] = []

    def load(self) -> None:
        """Take up what is on disk, and put it into one file.

        Raises:
            StateError: it cannot be read, or not be written.
        """
        self._rows = read_table(self._folder, self._name)
        self._in_file = self._rows.num_rows
        self._beside = [place for _, place in _files_beside(self._folder, self._name)]
        self.compact()

    def rows(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._rows.to_pylist()
        return found

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows and write them; they may have other columns than those before.

        Raises:
            StateError: it failed; all rows before are still there.
        """
        columns = list(dict.fromkeys(column for row in rows for column in row))
        new = pa.table({column: [row.get(column) for row in rows] for column in columns})
        joined = _joined([self._rows, new])
        small = joined.num_rows <= SMALL_ROWS
        grown = joined.num_rows - self._in_file >= self._in_file / PART or len(self._beside) >= MOST_BESIDE
        if small or grown:
            self._write_all(joined)
        elif rows:
            place = self._folder / f"{self._name}-{self._rows.num_rows:09d}.parquet"
            self._write(place, new)
            self._beside.append(place)
            self._rows = joined

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Drop rows; those that are on disk go with the next `append`.

        Raises:
            StateError: what is on disk could not be put into one file first.
        """
        self.compact()
        self._rows = self._rows.filter(pa.array([wanted(row) for row in self.rows()], pa.bool_()))
        self._in_file = 0  # what is there is not what belongs there

    def compact(self) -> None:
        """Put all rows into the one file, if some lie beside it.

        Raises:
            StateError: it cannot be written.
        """
        if self._beside:
            self._write_all(self._rows)

    def _write_all(self, rows: pa.Table) -> None:
        """Those beside go last: they are known to be in the file by the number of rows before theirs."""
        rows = self._arranged(rows).combine_chunks()
        self._write(self._folder / f"{self._name}.parquet", rows)
        self._rows, self._in_file = rows, rows.num_rows
        while self._beside:
            with _failing(self._beside[-1], "removed"):
                self._beside[-1].remove()
            self._beside.pop()

    def _write(self, place: StoragePath, rows: pa.Table) -> None:
        buffer = BytesIO()
        pq.write_table(rows, buffer)
        with _failing(place, "written"):
            place.write(buffer.getvalue(), self._durable)


def read_table(where: str | Path | StoragePath, name: str) -> pa.Table:
    """Return a table of a run's folder with all its rows, also while the run goes on and where it was ended; without
    rows and columns if it is not there.

    Raises:
        StateError: it cannot be read. ConfigError: pyarrow knows no such URI.
    """
    folder = StoragePath.of(where)
    for _ in range(READ_TRIES - 1):
        with suppress(StateError):
            return _read_table(folder, name)
    return _read_table(folder, name)


def _read_table(folder: StoragePath, name: str) -> pa.Table:
    beside = _files_beside(folder, name)  # first: what is settled from now on is in the file, and counted there
    file = folder / f"{name}.parquet"
    with _failing(file, "read"):
        parts = [_read(file)] if file.is_file() else []
    have = sum(part.num_rows for part in parts)
    for before, place in beside:
        if before < have:  # it is in the file already
            continue
        if before > have:
            raise StateError(f"{place}: cannot be read: of the {before} rows before its own there are {have}")
        parts.append(_read(place))
        have += parts[-1].num_rows
    return _joined(parts) if parts else pa.table({})


def _read(place: StoragePath) -> pa.Table:
    with _failing(place, "read"):
        return pq.read_table(BytesIO(place.read()))


def _joined(parts: Sequence[pa.Table]) -> pa.Table:
    return pa.concat_tables(parts, promote_options="permissive")


def _files_beside(folder: StoragePath, name: str) -> list[tuple[int, StoragePath]]:
    """Return the files beside the table's own, in order, each with the number of rows before its first."""
    pattern = re.compile(rf"{re.escape(name)}-(\d{{9,}})\.parquet")
    with _failing(folder, "read"):
        names = folder.names()
    found = [(int(match[1]), folder / match[0]) for other in names if (match := pattern.fullmatch(other))]
    return sorted(found, key=lambda entry: entry[0])


@contextmanager
def _failing(place: StoragePath, done: str) -> Iterator[None]:
    """Say of which file or folder it is that something cannot be done to it."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise StateError(f"{place}: cannot be {done}: {error}") from None
