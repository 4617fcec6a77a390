"""Reads CSV and tab-separated text into columns of strings.

pyarrow reads what is plainly well-formed. Everything else is read by Python's strict parser, which says what is wrong
and where; both give the same values.
"""

import csv
import io
import sys
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import csv as arrow_csv

from fedray.errors import DataError, choices

Table = tuple[dict[str, list[str]], list[int]]
"""Columns by name, and the line in which each row begins."""

QUOTE, NEWLINE, RETURN = b'"\n\r'
BLOCK = 1 << 30
"""Bytes that pyarrow reads at once, at most; it counts them as int32."""


def read_csv(raw: bytes, where: str) -> Table:
    """Read comma-separated UTF-8 whose first line names the columns.

    Raises:
        DataError: the text is malformed, or a column's name occurs twice. The message names the line.
    """
    return _fast(raw, ",") or _strict(decoded(raw, where), where, ",")


def read_tsv(raw: bytes, where: str) -> Table:
    """Read tab-separated UTF-8 whose first line names the columns.

    Some programs quote fields as in CSV, and others never do. Quotes are read as in CSV, unless this is malformed or
    joins lines that have the right number of fields by themselves.

    Raises:
        DataError: as `read_csv`.
    """
    if b'"' not in raw:
        return _fast(raw, "\t") or _strict(decoded(raw, where), where, "\t")
    text = decoded(raw, where)
    try:
        plain = _strict(text, where, "\t", csv.QUOTE_NONE)
    except DataError:  # a field may hold a line break, and then it is quoted
        return _strict(text, where, "\t")
    try:
        quoted = _strict(text, where, "\t")
    except DataError:
        return plain
    return quoted if len(quoted[1]) == len(plain[1]) else plain


def decoded(raw: bytes, where: str) -> str:
    """Return UTF-8 as text, without a byte order mark.

    Raises:
        DataError: it is not UTF-8; the message names the line.
    """
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{where}: line {line}: not UTF-8: {error.reason}; save the file as UTF-8") from None


def check_names(names: Sequence[str], where: str) -> None:
    """Check that no two columns share a name.

    Raises:
        DataError: a name occurs twice.
    """
    twice = dict.fromkeys(repr(name) for name in names if names.count(name) > 1)
    if twice:
        raise DataError(f"{where}: a column's name occurs twice: {choices(twice)}; rename or remove one of them")


def _strict(text: str, where: str, delimiter: str, quoting: int = csv.QUOTE_MINIMAL) -> Table:
    """Read with Python's parser, and say what is wrong."""
    header: list[str] = []
    records: list[list[str]] = []
    rows: list[int] = []
    start = 1
    with _long_fields():
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)  # type: ignore[arg-type]
        try:
            for record in reader:
                if not header:
                    header = record
                    check_names(header, f"{where}: line {start}")
                elif record:
                    if len(record) != len(header):
                        raise DataError(
                            f"{where}: line {start}: {len(record)} fields, but the header has {len(header)}"
                        )
                    records.append(record)
                    rows.append(start)
                start = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{where}: line {start}: not valid CSV: {error}") from None
    return {name: [record[i] for record in records] for i, name in enumerate(header)}, rows


@contextmanager
def _long_fields() -> Iterator[None]:
    """Lift the limit of 131,072 characters per field, which the csv module has for the whole process."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _fast(raw: bytes, delimiter: str) -> Table | None:
    """Read with pyarrow; return None where the strict parser might read something else."""
    raw = raw.removeprefix(BOM_UTF8)
    quotes = _quotes(raw, delimiter)
    if quotes is None:
        return None
    starts, lines = _records(raw, quotes)
    if len(starts) < 2:
        return None
    options = arrow_csv.ReadOptions(block_size=min(len(raw) + 1, BLOCK))
    try:
        with _long_fields():
            first = raw[starts[0] : starts[1]].decode()
            header = next(csv.reader(io.StringIO(first, newline=""), delimiter=delimiter, strict=True))
        table = arrow_csv.read_csv(
            pa.py_buffer(raw),
            options,
            arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            arrow_csv.ConvertOptions(column_types=dict.fromkeys(header, pa.string()), strings_can_be_null=False),
        )
        if table.column_names != header or len(set(header)) < len(header) or len(table) != len(starts) - 1:
            return None
        return {name: table[name].to_pylist() for name in header}, lines[1:].tolist()
    except (pa.ArrowException, UnicodeDecodeError, csv.Error):
        return None


def _quotes(raw: bytes, delimiter: str) -> npt.NDArray[np.int64] | None:
    """Return the places of the quotation marks; None unless all of them enclose whole fields or are doubled."""
    if raw.startswith(BOM_UTF8) or b"\0" in raw or raw.count(b"\r") != raw.count(b"\r\n"):
        return None
    data = np.frombuffer(raw, np.uint8)
    quotes = np.flatnonzero(data == QUOTE)
    before, after = quotes[::2] - 1, quotes[1::2] + 1
    allowed = np.zeros(256, np.bool_)
    allowed[list(f'{delimiter}\n\r"'.encode())] = True
    enclosing = allowed[data[before[before >= 0]]].all() and allowed[data[after[after < len(data)]]].all()
    return quotes if len(before) == len(after) and enclosing else None


def _records(raw: bytes, quotes: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return where the records begin that are not blank, and in which lines."""
    data = np.frombuffer(raw, np.uint8)
    breaks = np.flatnonzero(data == NEWLINE)
    outside = breaks[np.searchsorted(quotes, breaks) % 2 == 0]
    starts = np.concatenate([[0], outside + 1])
    starts = starts[starts < len(data)]
    following = data[np.minimum(starts + 1, len(data) - 1)]
    blank = (data[starts] == NEWLINE) | ((data[starts] == RETURN) & (following == NEWLINE))
    starts = starts[~blank]
    return starts, np.searchsorted(breaks, starts) + 1
