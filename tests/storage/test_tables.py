"""Tables that grow: at any moment everything that was appended can be read, and much is written seldom."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs

from fedray.errors import StateError
from fedray.storage import tables
from fedray.storage.paths import StoragePath
from fedray.storage.tables import Table, read_table


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of more than 8 rows are large."""
    monkeypatch.setattr(tables, "SMALL_ROWS", 8)


def numbered(start: int, stop: int) -> list[dict[str, Any]]:
    return [{"number": number, "method": "ab"[number % 2]} for number in range(start, stop)]


def on_disk(folder: Path) -> list[int]:
    table = read_table(folder, "clients")
    return [row["number"] for row in table.to_pylist()]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_small_table_is_one_file_and_a_large_one_is_written_anew_when_it_has_grown_by_an_eighth(
    tmp_path: Path,
) -> None:
    """16 rows, then one at a time: the second makes an eighth of 16."""
    table = Table(StoragePath.of(tmp_path), "clients")
    table.append(numbered(0, 3))
    table.append(numbered(3, 16))
    assert files(tmp_path) == ["clients.parquet"]
    table.append(numbered(16, 17))
    assert files(tmp_path) == ["clients-000000016.arrow", "clients.parquet"]
    assert pq.read_table(tmp_path / "clients.parquet").num_rows == 16
    assert on_disk(tmp_path) == list(range(17))
    table.append(numbered(17, 18))
    assert files(tmp_path) == ["clients.parquet"]
    assert pd.read_parquet(tmp_path / "clients.parquet").number.tolist() == list(range(18))


def test_a_small_table_is_written_anew_every_half_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rows and those after half a second are in the file; others beside it."""
    table = Table(StoragePath.of(tmp_path), "clients")
    table.append(numbered(0, 1))
    assert files(tmp_path) == ["clients.parquet"]
    monkeypatch.setattr(tables, "REWRITE_S", 1e6)
    table.append(numbered(1, 4))
    table.append([{"extra": 0.5, **numbered(4, 5)[0]}])
    assert files(tmp_path) == ["clients-000000001.arrow", "clients-000000004.arrow", "clients.parquet"]
    assert on_disk(tmp_path) == [0, 1, 2, 3, 4]
    monkeypatch.setattr(tables, "REWRITE_S", 0.0)
    table.append(numbered(5, 6))
    assert files(tmp_path) == ["clients.parquet"]
    found = pd.read_parquet(tmp_path / "clients.parquet")
    assert found.number.tolist() == [0, 1, 2, 3, 4, 5]
    assert found.extra.dropna().tolist() == [0.5]
    assert read_table(tmp_path, "clients", lambda column: column == "extra").column_names == ["extra"]


def test_side_files_of_older_versions_are_read(tmp_path: Path) -> None:
    """They were in Parquet."""
    for name, (start, stop) in {"clients": (0, 32), "clients-000000032": (32, 34)}.items():
        pq.write_table(pa.Table.from_pylist(numbered(start, stop)), tmp_path / f"{name}.parquet")
    assert on_disk(tmp_path) == list(range(34))
    table = Table(StoragePath.of(tmp_path), "clients")
    table.load()
    assert files(tmp_path) == ["clients.parquet"]
    assert on_disk(tmp_path) == list(range(34))


def test_what_is_written_grows_with_the_rows_and_not_with_their_square(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice as many appends of two rows write little more than twice as many rows; all of them anew: four times. That
    is so until 64 files lie beside."""
    monkeypatch.setattr(tables, "MAX_SIDE_FILES", 1000)
    written = []
    write = pq.write_table
    monkeypatch.setattr(
        pq, "write_table", lambda rows, *on, **how: written.append(rows.num_rows) or write(rows, *on, **how)
    )
    totals = []
    for number in (400, 800):
        (tmp_path / str(number)).mkdir()
        table = Table(StoragePath.of(tmp_path / str(number)), "clients", durable=False)
        written.clear()
        for start in range(0, 2 * number, 2):
            table.append(numbered(start, start + 2))
        totals.append(sum(written))
        assert on_disk(tmp_path / str(number)) == list(range(2 * number))
    assert totals[0] < 11 * 800
    assert totals[1] < 2.2 * totals[0]


class Ended(Exception):
    """The process."""


@contextmanager
def ending_after(operations: int) -> Iterator[None]:
    """Only so many files are written or removed."""
    left = operations
    real = {name: getattr(StoragePath, name) for name in ("write", "remove")}

    def until_the_end(name: str) -> Callable[..., None]:
        def act(*arguments: Any) -> None:
            nonlocal left
            if left == 0:
                raise Ended
            left -= 1
            real[name](*arguments)

        return act

    with pytest.MonkeyPatch.context() as patch:
        for name in real:
            patch.setattr(StoragePath, name, until_the_end(name))
        yield


@settings(max_examples=200)
@given(data=st.data())
def test_every_row_is_there_whatever_happens_between(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Appends of any size and with other columns, rows taken back, and a process that ends between any two operations
    on files and is continued: what an append was to write is there wholly or not at all, everything before it once."""
    folder = tmp_path_factory.mktemp("run")
    table = Table(StoragePath.of(folder), "clients", durable=False)
    held: list[int] = []  # by the table
    stored: list[int] = []  # what a reader finds; not the same after `keep`
    for step in range(data.draw(st.integers(1, 14))):
        kind = data.draw(st.sampled_from(["append", "append", "append", "keep", "compact", "continue"]))
        rows = numbered(100 * step, 100 * step + data.draw(st.integers(1, 12)))
        if data.draw(st.booleans()):
            rows = [row | {"extra": 0.5} for row in rows]
        limit = data.draw(st.integers(0, 100 * step + 1))
        hoped = [*held, *(row["number"] for row in rows)] if kind == "append" else stored
        try:
            with ending_after(data.draw(st.sampled_from([0, 1, 2, 3, 99]))):
                if kind == "append":
                    table.append(rows)
                    held = stored = hoped
                elif kind == "keep":
                    table.keep(lambda row, limit=limit: row["number"] < limit)
                    held = [number for number in held if number < limit]
                elif kind == "compact":
                    table.compact()
                else:
                    table = Table(StoragePath.of(folder), "clients", durable=False)
                    table.load()
                    held = stored
                if kind in ("compact", "continue"):
                    assert len(files(folder)) <= 1
        except Ended:
            assert on_disk(folder) in (stored, hoped)
            held = stored = on_disk(folder)
            table = Table(StoragePath.of(folder), "clients", durable=False)
            table.load()
        assert [row["number"] for row in table.rows()] == held
        assert on_disk(folder) == stored


@pytest.mark.parametrize("moment", range(4))
def test_a_reader_finds_the_rows_of_some_moment_while_another_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """Before the reader's operation of this number the writer puts all rows into the file, and others beside it."""
    table, left = Table(StoragePath.of(tmp_path), "clients"), moment
    for start, stop in ((0, 16), (16, 17)):
        table.append(numbered(start, stop))

    def after_the_writer(real: Callable[..., Any]) -> Callable[..., Any]:
        def act(*arguments: Any) -> Any:
            nonlocal left
            left -= 1
            if left == -1:
                for start in range(17, 20):
                    table.append(numbered(start, start + 1))
                beside = ["clients-000000018.arrow", "clients-000000019.arrow"]
                assert files(tmp_path) == [*beside, "clients.parquet"]
            return real(*arguments)

        return act

    for name in ("names", "read", "is_file"):
        monkeypatch.setattr(StoragePath, name, after_the_writer(getattr(StoragePath, name)))
    found = on_disk(tmp_path)
    assert found in [list(range(number)) for number in range(17, 21)]
    assert left < 0


def test_few_files_lie_beside_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_SIDE_FILES", 3)
    table = Table(StoragePath.of(tmp_path), "clients")
    table.append(numbered(0, 800))
    found = []
    for start in range(800, 808):
        table.append(numbered(start, start + 1))
        found.append(len(files(tmp_path)) - 1)
    assert found == [1, 2, 3, 0, 1, 2, 3, 0]
    assert on_disk(tmp_path) == list(range(808))


def test_a_table_that_is_not_on_this_machine(tmp_path: Path) -> None:
    elsewhere = StoragePath(fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), "run")
    table = Table(elsewhere, "clients")
    for start, stop in ((0, 32), (32, 34), (34, 35)):
        table.append(numbered(start, stop))
    assert elsewhere.names() == ["clients-000000032.arrow", "clients-000000034.arrow", "clients.parquet"]
    again = Table(elsewhere, "clients")
    again.load()
    assert elsewhere.names() == ["clients.parquet"]
    assert [row["number"] for row in again.rows()] == list(range(35))


def test_rows_that_have_come_into_the_file_count_once(tmp_path: Path) -> None:
    """The process ended between writing the file and removing those beside it."""
    table = Table(StoragePath.of(tmp_path), "clients")
    for start, stop in ((0, 32), (32, 34), (34, 35)):
        table.append(numbered(start, stop))
    left = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    assert len(left) == 3
    table.compact()
    for name, blob in left.items():
        if name != "clients.parquet":
            (tmp_path / name).write_bytes(blob)
    assert on_disk(tmp_path) == list(range(35))
    again = Table(StoragePath.of(tmp_path), "clients")
    again.load()
    assert files(tmp_path) == ["clients.parquet"]
    assert on_disk(tmp_path) == list(range(35))


def test_a_file_that_is_missing_or_broken_is_named(tmp_path: Path) -> None:
    table = Table(StoragePath.of(tmp_path), "clients")
    for start, stop in ((0, 32), (32, 34), (34, 35)):
        table.append(numbered(start, stop))
    beside = tmp_path / "clients-000000032.arrow"
    whole = beside.read_bytes()
    beside.write_bytes(whole[:-5])
    with pytest.raises(StateError, match=r"clients-000000032\.arrow: cannot be read: "):
        read_table(StoragePath.of(tmp_path), "clients")
    beside.unlink()
    with pytest.raises(StateError, match=r"clients-000000034\.arrow: .* only 32 of the 34 rows before its own exist"):
        Table(StoragePath.of(tmp_path), "clients").load()


def test_rows_stand_in_the_order_that_was_asked_for_once_they_are_in_the_file(tmp_path: Path) -> None:
    table = Table(StoragePath.of(tmp_path), "clients", arranged=lambda rows: rows.sort_by([("number", "descending")]))
    table.append(numbered(0, 32))
    table.append(numbered(32, 34))
    assert on_disk(tmp_path) == [*range(31, -1, -1), 32, 33]
    table.compact()
    assert on_disk(tmp_path) == list(range(33, -1, -1))


def test_another_tables_files_are_let_alone(tmp_path: Path) -> None:
    pq.write_table(pa.table({"number": [1]}), tmp_path / "clients-old-000000032.parquet")
    pq.write_table(pa.table({"number": [1]}), tmp_path / "rounds-000000032.parquet")
    assert read_table(StoragePath.of(tmp_path), "clients").num_rows == 0
