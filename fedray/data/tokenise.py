"""Tokenises examples once: the result is kept as an Arrow file, named by a digest of everything that decides it."""

import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import transformers
from transformers import PreTrainedTokenizerBase

from fedray.config import DataConfig
from fedray.data.cache import replacing
from fedray.data.examples import Examples
from fedray.errors import DataError
from fedray.models.tokenizer import end_token_id
from fedray.types import IGNORED

FORMAT = "1"
"""Changes whenever the same input would give other tokens or another file."""
CHECKSUM = b"crc32"
ROWS_PER_CALL = 4096
"""Texts that the tokenizer gets at once."""
TOKENS = pa.list_(pa.int32())
Ids = Sequence[int]


def tokenise(examples: Examples, tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> pa.Table:
    """Return the examples' tokens, row by row, with the columns that `Shard` documents.

    Texts longer than max_length are cut at the end. causal_lm: prompt, answer and end-of-text token. If they are too
    long, the prompt is cut at its start, down to a quarter of max_length. Then the answer is cut at its end, together
    with the end-of-text token, which would teach the model to stop there. A prompt without tokens becomes one
    end-of-text token, because the model needs something to continue.

    Raises:
        DataError: the cache folder cannot be written, or a text has no tokens at all.
    """
    path = Path(data.cache_dir).expanduser() / "tokens" / f"{_digest(examples, tokenizer, data)}.arrow"
    tokens = _read(path, len(examples))
    if tokens is None:
        tokens = _tokenised(examples, tokenizer, data.max_length)
        _write(tokens, path)
    if examples.task == "causal_lm":
        return tokens.append_column("answer", examples.table["answer"])
    return tokens.append_column("labels", _labels(examples))


def _labels(examples: Examples) -> pa.Array:
    """Return class indices (int32) or numbers (float32)."""
    if examples.task == "regression":
        return examples.table["label"].cast(pa.float32())
    index = {name: i for i, name in enumerate(examples.label_names)}
    return pa.array([index[name] for name in examples.table["label"].to_pylist()], pa.int32())


def _tokenised(examples: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int) -> pa.Table:
    encode = _encode_causal if examples.task == "causal_lm" else _encode_texts
    parts = [examples.table.slice(start, ROWS_PER_CALL) for start in range(0, len(examples), ROWS_PER_CALL)]
    table = pa.concat_tables(encode(part, tokenizer, max_length) for part in parts).combine_chunks()
    lengths = np.diff(table["input_ids"].chunk(0).offsets.to_numpy())
    if not lengths.all():
        row = int(np.argmin(lengths))
        text = examples.table[0 if examples.task == "causal_lm" else examples.table.column_names.index("text")]
        raise DataError(f"the tokenizer makes no tokens of {str(text[row])[:80]!r}; leave such rows out")
    return table


def _encode_texts(table: pa.Table, tokenizer: PreTrainedTokenizerBase, max_length: int) -> pa.Table:
    paired = "text_pair" in table.column_names
    encoded = tokenizer(
        table["text"].to_pylist(),
        table["text_pair"].to_pylist() if paired else None,
        truncation=True,
        max_length=max_length,
        return_attention_mask=False,
    )
    names = [name for name in ("input_ids", "token_type_ids") if name in encoded and (paired or name == "input_ids")]
    return pa.table({name: _lists(encoded[name]) for name in names})


def _encode_causal(table: pa.Table, tokenizer: PreTrainedTokenizerBase, max_length: int) -> pa.Table:
    end = end_token_id(tokenizer)
    start = _start_tokens(tokenizer)
    prompts, answers = (
        tokenizer(
            table[name].to_pylist(), add_special_tokens=False, return_attention_mask=False, verbose=False
        ).input_ids
        for name in ("prompt", "answer")
    )
    rows = [
        _fitted([*start, *prompt] or [end], [*answer, end], len(start), max_length)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return pa.table(
        {
            "input_ids": _lists([[*prompt, *answer] for prompt, answer in rows]),
            "labels": _lists([[IGNORED] * len(prompt) + [*answer] for prompt, answer in rows]),
        }
    )


def _fitted(prompt: Ids, answer: Ids, kept: int, max_length: int) -> tuple[Ids, Ids]:
    """Return prompt and answer cut to max_length tokens together; the prompt's first `kept` tokens stay."""
    room = max(max_length - len(answer), max_length // 4)
    if len(prompt) > room:
        start = prompt[: min(kept, room)]
        prompt = [*start, *prompt[len(prompt) - (room - len(start)) :]]
    return prompt, answer[: max_length - len(prompt)]


def _start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token with which this tokenizer begins a text (bos or cls), if any."""
    first = tokenizer("").input_ids[:1]
    return [int(token) for token in first if token in (tokenizer.bos_token_id, tokenizer.cls_token_id)]


def _lists(rows: Sequence[Ids]) -> pa.ListArray:
    """Return list<int32>[rows]."""
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int32)
    values = np.fromiter(chain.from_iterable(rows), dtype=np.int32, count=int(offsets[-1]))
    return pa.ListArray.from_arrays(offsets, values)


def _digest(examples: Examples, tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> str:
    digest = hashlib.sha256()
    for part in (FORMAT, transformers.__version__, examples.task, data.max_length, *_identity(tokenizer)):
        digest.update(f"{part}\x1f".encode())
    for name in ("text", "text_pair", "prompt", "answer"):
        if name in examples.table.column_names:
            # Templates are already filled in, so their result stands for them.
            for text in examples.table[name].to_pylist():
                digest.update(f"{name}{len(text)}:{text}".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


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
            crc = zlib.crc32(np.diff(array.offsets.to_numpy()).tobytes(), crc)
            crc = zlib.crc32(array.flatten().to_numpy().data, crc)
    return str(crc).encode()


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
