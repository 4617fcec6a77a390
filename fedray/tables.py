"""Tables of a run that grow by rows, a Parquet file each: what was appended is on disk when `append` returns.

A Parquet file cannot be appended to, and to write all of it after every round would make a run's time quadratic in its
rounds. So the file of a large table is written anew only when the table has grown by an eighth. Until then new rows lie
in files beside it, each named after the number of rows before its own: `clients.parquet`, `clients-000010000.parquet`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fedray.errors import StateError
from fedray.storage import Place

SMALL_ROWS = 10_000
"""A table of so many rows is one file at any time: it is written in some milliseconds."""
PART = 8
"""The file is written anew for 1 / PART of its rows."""


class Table:
    """NAME.parquet in a folder, empty at first.

    durable: whether what was appended survives a crash of the machine. arranged: puts the rows into the order in which
    they shall stand in the file.
    """

    def __init__(
        self,
        folder: Place,
        name: str,
        durable: bool = True,
        arranged: Callable[[pa.Table], pa.Table] = lambda rows: rows,
    ):
        self._folder, self._name, self._durable, self._arranged = folder, name, durable, arranged
        self._rows = pa.table({})
        self._in_file = 0
        self._beside: list[Place] = []

    def load(self) -> None:
        """Take up what is on disk. Raises StateError: it cannot be read."""
        self._rows = read_table(self._folder, self._name)
        self._in_file = self._rows.num_rows
        self._beside = [place for _, place in _beside(self._folder, self._name)]
        self.settle()

    def rows(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._rows.to_pylist()
        return found

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows and write them; they may have other columns than those before. Raises StateError: it failed."""
        columns = list(dict.fromkeys(column for row in rows for column in row))
        new = pa.table({column: [row.get(column) for row in rows] for column in columns})
        before = self._rows.num_rows
        self._rows = _joined([self._rows, new])
        number = self._rows.num_rows
        if number <= SMALL_ROWS or number - self._in_file >= self._in_file / PART:
            self._write_all()
        elif rows:
            place = self._folder / f"{self._name}-{before:09d}.parquet"
            self._write(place, new)
            self._beside.append(place)

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Drop rows; those that are on disk go with the next `append`."""
        self.settle()
        self._rows = self._rows.filter(pa.array([wanted(row) for row in self.rows()], pa.bool_()))
        self._in_file = 0  # what is there is not what belongs there

    def settle(self) -> None:
        """Put all rows into the one file. Raises StateError: it cannot be written."""
        if self._beside:
            self._write_all()

    def _write_all(self) -> None:
        self._rows = self._arranged(self._rows).combine_chunks()
        self._write(self._folder / f"{self._name}.parquet", self._rows)
        self._in_file = self._rows.num_rows
        while self._beside:
            self._beside.pop().remove()

    def _write(self, place: Place, rows: pa.Table) -> None:
        buffer = BytesIO()
        pq.write_table(rows, buffer)
        try:
            place.write(buffer.getvalue(), self._durable)
        except OSError as error:
            raise StateError(f"{place}: cannot be written: {error}") from None


def read_table(folder: Place, name: str) -> pa.Table:
    """Return a table with all its rows, those of a process that writes or was ended included; empty if there is none.

    Raises:
        StateError: it cannot be read.
    """
    file = folder / f"{name}.parquet"
    parts = [_read(file)] if file.is_file() else []
    have = sum(part.num_rows for part in parts)
    for before, place in _beside(folder, name):
        if before < have:  # the process ended after these rows had come into the file
            continue
        if before > have:
            raise StateError(f"{place}: cannot be read: of {before} rows before it there are {have}")
        parts.append(_read(place))
        have += parts[-1].num_rows
    return _joined(parts) if parts else pa.table({})


def _read(place: Place) -> pa.Table:
    try:
        return pq.read_table(BytesIO(place.read()))
    except (OSError, pa.ArrowException) as error:
        raise StateError(f"{place}: cannot be read: {error}") from None


def _joined(parts: Sequence[pa.Table]) -> pa.Table:
    return pa.concat_tables(parts, promote_options="permissive")


def _beside(folder: Place, name: str) -> list[tuple[int, Place]]:
    """Return the files beside the table's own, in order, each with the number of rows before its first."""
    pattern = re.compile(rf"{re.escape(name)}-(\d{{9,}})\.parquet")
    found = [(int(match[1]), folder / match[0]) for other in folder.names() if (match := pattern.fullmatch(other))]
    return sorted(found, key=lambda entry: entry[0])
