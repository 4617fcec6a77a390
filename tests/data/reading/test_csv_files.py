"""CSV and TSV: the fast reader gives what the strict one gives, and both uses of quotes in TSV are understood."""

import csv
import io
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedray.data.reading.csv_files import Table, _fast, _strict, read_csv, read_tsv
from fedray.errors import DataError

CELL = st.lists(
    st.sampled_from(
        ['"', ",", "\t", "\n", "\r\n", "a", "é", " ", "NA", "null", "1.0", "01", "true", "2020-01-01", "#"]
    ),
    max_size=4,
).map("".join)
DELIMITERS = st.sampled_from([",", "\t"])


@given(
    rows=st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(CELL, min_size=n, max_size=n), min_size=1, max_size=6)),
    end=st.sampled_from(["\n", "\r\n", "\n\n"]),
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
    mark=st.booleans(),
    delimiter=DELIMITERS,
)
def test_well_formed_tables_are_read_fast_and_as_they_were_written(
    rows: list[list[str]], end: str, quoting: int, mark: bool, delimiter: str
) -> None:
    out = io.StringIO()
    names = [f"column {i}" for i in range(len(rows[0]))]
    writer = csv.writer(out, lineterminator=end, quoting=quoting, delimiter=delimiter)  # type: ignore[arg-type]
    writer.writerows([names, *rows])
    raw = (b"\xef\xbb\xbf" if mark else b"") + out.getvalue().encode()
    found = _fast(raw, delimiter)
    assert found is not None
    columns, lines = found
    assert list(columns) == names
    assert [list(row) for row in zip(*columns.values(), strict=True)] == rows
    assert found == _strict(out.getvalue(), "file", delimiter)
    breaks = [sum(cell.count("\n") for cell in row) + end.count("\n") for row in rows]
    assert lines == [1 + end.count("\n") + sum(breaks[:index]) for index in range(len(rows))]


PIECES = [
    '"',
    '""',
    ",",
    "\n",
    "\r\n",
    "\r",
    "a",
    "é",
    " ",
    "\t",
    "0",
    '"a"',
    '"a,b"',
    '"l\nm"',
    "\0",
    "\ufeff",
    '"x""y"',
]


@given(start=st.sampled_from(["", "a,b\n", "a\tb\r\n"]), pieces=st.lists(st.sampled_from(PIECES), max_size=14))
def test_whatever_the_fast_reader_reads_the_strict_one_reads_so_too(start: str, pieces: list[str]) -> None:
    text = start + "".join(pieces)
    for delimiter in ",\t":
        found = _fast(text.encode(), delimiter)
        assert found is None or found == _strict(text.removeprefix("\ufeff"), "file", delimiter)


@pytest.mark.parametrize("text", ['a,b\n"x"y,z\n', 'a,b\n"x" ,z\n', 'a,b\nx,"y\n', 'a,b\n"x""y,z\n', "a,b\nx\n"])
def test_malformed_tables_are_left_to_the_strict_reader(text: str) -> None:
    assert _fast(text.encode(), ",") is None
    with pytest.raises(DataError, match=r"file: line 2: "):
        read_csv(text.encode(), "file")


def rows_of(table: Table) -> list[tuple[str, ...]]:
    return list(zip(*table[0].values(), strict=True))


@pytest.mark.parametrize(
    ("body", "rows", "lines"),
    [
        # Quoted as in CSV.
        ('"a ""b"""\t1\n"c\nd"\t2\n', [('a "b"', "1"), ("c\nd", "2")], [2, 3]),
        ('"a\tb"\t1\n', [("a\tb", "1")], [2]),
        ('"a"\t1\nb "c" d\t2\n', [("a", "1"), ('b "c" d', "2")], [2, 3]),
        # Never quoted: as CSV, the first two are malformed, and the third joins two lines.
        ('"a" b\t1\nc\t2\n', [('"a" b', "1"), ("c", "2")], [2, 3]),
        ('a\t1\n"b\t2\n', [("a", "1"), ('"b', "2")], [2, 3]),
        ('"a\t1\nb"\t2\n', [('"a', "1"), ('b"', "2")], [2, 3]),
    ],
)
def test_quotes_of_tab_separated_files(body: str, rows: list[tuple[str, str]], lines: list[int]) -> None:
    table = read_tsv(f"text\tlabel\n{body}".encode(), "file")
    assert (rows_of(table), table[1]) == (rows, lines)


def test_real_files_are_read_alike(shared_data: Path) -> None:
    """Fields with line breaks, commas and quotes; every row has its line, at which its first field begins."""
    for name in ("train", "test"):
        raw = (shared_data / "banking77" / f"{name}.csv").read_bytes()
        found = _fast(raw, ",")
        assert found is not None
        assert found == _strict(raw.decode(), "file", ",")
        texts = raw.decode().split("\n")
        for text, line in zip(found[0]["text"], found[1], strict=True):
            assert texts[line - 1].lstrip('"').startswith(text.split("\n")[0].split('"')[0].rstrip("\r"))
    assert len(list(chain.from_iterable(found[0].values()))) == 2 * 3080
