"""Tables of tokens that are made once: kept as Arrow files, named by a digest of everything that decides them."""

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import transformers
from transformers import PreTrainedTokenizerBase

from fedray.models.cache import replacing

FORMAT = "2"
"""Changes whenever the same input would give other tokens or another file."""
CHECKSUM = b"crc32"


def cached_table(
    cache_dir: str,
    tokenizer: PreTrainedTokenizerBase,
    settings: Iterable[object],
    contents: Iterable[bytes],
    num_rows: int,
    make: Callable[[], pa.Table],
) -> pa.Table:
    """Return a table from the cache, memory-mapped, or make it and keep it there.

    Args:
        cache_dir: the setting `data.cache_dir`.
        tokenizer, settings, contents: decide the table, together with the version of transformers.
        num_rows: of the table.

    Raises:
        ConfigError: the folder cannot be written.
    """
    digest = hashlib.sha256()
    for part in (FORMAT, transformers.__version__, *settings, *_identity(tokenizer)):
        digest.update(f"{part}\x1f".encode())
    for content in contents:
        digest.update(content)
    path = Path(cache_dir).expanduser() / "tokens" / f"{digest.hexdigest()}.arrow"
    table = _read(path, num_rows)
    if table is None:
        table = make()
        _write(table, path)
    return table


def _identity(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield all of a tokenizer that decides which tokens it makes."""
    yield type(tokenizer).__name__
    yield repr(sorted(tokenizer.special_tokens_map.items(), key=str))
    yield repr((tokenizer.truncation_side, tokenizer.model_input_names))
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        # What the last call asked for, not what the tokenizer is.
        yield json.dumps({key: backend[key] for key in backend if key not in ("truncation", "padding")})
    else:
        yield tokenizer.name_or_path
        yield repr(sorted(tokenizer.get_vocab().items()))


def _checksum(table: pa.Table) -> bytes:
    """Return the CRC-32 of all values and row lengths."""
    crc = 0
    for column in table.columns:
        for array in column.chunks:
            for values in _values(array):
                crc = zlib.crc32(np.ascontiguousarray(values).data, crc)
    return str(crc).encode()


def _values(array: pa.Array) -> Iterator[np.ndarray]:
    """Yield the numbers that make up a column: lists and texts as row lengths and what is in them."""
    if pa.types.is_string(array.type):
        yield np.asarray(pc.binary_length(array))
        offsets = np.frombuffer(array.buffers()[1], np.int32)[array.offset : array.offset + len(array) + 1]
        yield np.frombuffer(array.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]]
    elif pa.types.is_list(array.type):
        yield np.diff(array.offsets.to_numpy())
        yield array.flatten().to_numpy()
    else:
        yield array.to_numpy()


def _read(path: Path, num_rows: int) -> pa.Table | None:
    """Return the memory-mapped table of a cache file; None if there is none, or it is damaged."""
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        if table.num_rows == num_rows and (table.schema.metadata or {}).get(CHECKSUM) == _checksum(table):
            return table
    except (OSError, pa.ArrowException, ValueError):
        pass
    return None


def _write(table: pa.Table, path: Path) -> None:
    table = table.replace_schema_metadata({CHECKSUM: _checksum(table)})
    with replacing(path) as temporary, pa.ipc.new_file(temporary, table.schema) as writer:
        writer.write_table(table)
