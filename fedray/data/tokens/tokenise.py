"""Tokenises examples once: the result is kept as a file (`fedray.data.tokens.cache`)."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from fedray.config import DataConfig
from fedray.data.examples import Examples
from fedray.data.tokens.cache import cached_table
from fedray.data.tokens.causal import CausalEncoder, TokenRow
from fedray.data.tokens.chat import ChatTemplate, MarkedText
from fedray.data.tokens.notes import token_notes
from fedray.errors import DataError
from fedray.models.tokenizer import end_token_id

ROWS_PER_CALL = 4096
"""Texts that the tokenizer gets at once."""
MEASURES = ("length", "lost", "shared")
"""Columns of the cache from which the notes are made; see `TokenRow`."""
Ids = Sequence[int]
Mark = Callable[[Examples, int], MarkedText]


@dataclass(frozen=True)
class Tokenised:
    """The examples' tokens.

    Attributes:
        table: row by row, with the columns that `Shard` documents.
        notes: what was cut or looks wrong, a sentence each.
    """

    table: pa.Table
    notes: tuple[str, ...]


def tokenise(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, data: DataConfig, template: ChatTemplate | None = None
) -> Tokenised:
    """Return the examples' tokens, from the cache if they are there.

    Texts longer than max_length are cut at the end. causal_lm: prompt, answer and end-of-text token, or a conversation
    up to its last answer. If it is too long, what precedes the last answer is cut at its start, down to a quarter of
    max_length. Then the answer is cut at its end, together with the token that ends it, which would teach the model to
    stop there. A prompt without tokens becomes one end-of-text token, because the model needs something to continue.

    Args:
        template: renders conversations.

    Raises:
        DataError: the cache folder cannot be written, a text has no tokens, or a conversation cannot be rendered.
    """
    if examples.conversations and template is None:
        raise DataError(
            f"the data are conversations, but the tokenizer {tokenizer.name_or_path!r} has no chat template; set "
            "data.chat_template to `plain`, `chatml`, a Jinja template, or the path of a file with one"
        )
    chat = repr(template) if examples.conversations else ""
    tokens = cached_table(
        data.cache_dir,
        tokenizer,
        (examples.task, data.max_length, chat),
        _contents(examples),
        len(examples),
        lambda: _tokenised(examples, tokenizer, data.max_length, template),
    )
    notes = tuple(token_notes(tokens, tokenizer, data.max_length))
    if template is not None and examples.conversations and template.note:
        notes = (*notes, template.note)
    tokens = tokens.drop_columns([name for name in MEASURES if name in tokens.column_names])
    if examples.task != "causal_lm":
        tokens = tokens.append_column("labels", _labels(examples))
    return Tokenised(tokens, notes)


def _labels(examples: Examples) -> pa.Array:
    """Return class indices (int32) or numbers (float32)."""
    if examples.task == "regression":
        return examples.table["label"].cast(pa.float32())
    index = {name: i for i, name in enumerate(examples.label_names)}
    return pa.array([index[name] for name in examples.table["label"].to_pylist()], pa.int32())


def _tokenised(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int, template: ChatTemplate | None
) -> pa.Table:
    if examples.task != "causal_lm":
        encode = partial(_encode_texts, tokenizer=tokenizer, max_length=max_length)
    elif not examples.conversations or template is None:
        ending = str(tokenizer.convert_ids_to_tokens(end_token_id(tokenizer)))
        encoder = CausalEncoder(tokenizer, max_length)
        encode = partial(_encode_marked, encoder=encoder, mark=partial(_pair, ending=ending))
    else:
        begins, ends = not template.from_tokenizer, template.end_token is None
        encoder = CausalEncoder(tokenizer, max_length, begins, ends, controls=True)
        encode = partial(_encode_marked, encoder=encoder, mark=partial(_conversation, template=template))
    starts = range(0, len(examples), ROWS_PER_CALL)
    parts = [range(start, min(start + ROWS_PER_CALL, len(examples))) for start in starts]
    return pa.concat_tables(encode(examples, part) for part in parts).combine_chunks()


def _encode_texts(examples: Examples, part: range, tokenizer: PreTrainedTokenizerBase, max_length: int) -> pa.Table:
    table = examples.table.slice(part.start, len(part))
    texts = [table[name].to_pylist() for name in ("text", "text_pair") if name in table.column_names]

    def encoded(rows: Sequence[int], **cut: Any) -> Mapping[str, Any]:
        given = [[column[row] for row in rows] for column in texts]
        found: Mapping[str, Any] = tokenizer(*given, return_attention_mask=False, verbose=False, **cut)
        return found

    whole = encoded(range(len(part)))
    lengths = [len(ids) for ids in whole["input_ids"]]
    if not all(lengths):
        row = lengths.index(0)
        text = texts[0][row][:80]
        raise DataError(f"{examples.place(part[row])}: the tokenizer makes no tokens of {text!r}; leave such rows out")
    names = ("input_ids", "token_type_ids") if len(texts) > 1 and "token_type_ids" in whole else ("input_ids",)
    columns = {name: list(whole[name]) for name in names}
    longer = [row for row, length in enumerate(lengths) if length > max_length]
    if longer:
        cut = encoded(longer, truncation=True, max_length=max_length)
        for name in names:
            for row, values in zip(longer, cut[name], strict=True):
                columns[name][row] = values
    lists = {name: _lists(values) for name, values in columns.items()}
    return pa.table(lists | {"length": pa.array(lengths, pa.int32())})


def _encode_marked(examples: Examples, part: range, encoder: CausalEncoder, mark: Mark) -> pa.Table:
    rows = list(encoder([mark(examples, row) for row in part]))
    columns = {entry.name: [getattr(row, entry.name) for row in rows] for entry in fields(TokenRow)}
    tokens = {name: _lists(columns.pop(name)) for name in ("input_ids", "labels")}
    measures = {name: pa.array(columns[name], pa.int32()) for name in MEASURES}
    return pa.table(tokens | {"answer": pa.array(columns["answer"], pa.string())} | measures)


def _pair(examples: Examples, row: int, ending: str) -> MarkedText:
    """Return a prompt with its answer, which has the loss.

    Args:
        ending: text of the end-of-text token, which an answer may already have.
    """
    prompt, answer = (examples.table[name][row].as_py() for name in ("prompt", "answer"))
    border, text = len(prompt), prompt + answer
    return MarkedText(text, ((border, len(text)),), border + len(answer.removesuffix(ending)))


def _conversation(examples: Examples, row: int, template: ChatTemplate) -> MarkedText:
    """Return a conversation as the template renders it."""
    turns, context = (examples.table[name][row].as_py() for name in ("turns", "context"))
    try:
        return template.render(json.loads(turns), context)
    except DataError as error:
        raise DataError(f"{examples.place(row)}: {error}") from error


def _lists(rows: Sequence[Ids]) -> pa.ListArray:
    """Return list<int32>[rows]."""
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int32)
    values = np.fromiter(chain.from_iterable(rows), dtype=np.int32, count=int(offsets[-1]))
    return pa.ListArray.from_arrays(offsets, values)


def _contents(examples: Examples) -> Iterator[bytes]:
    """Yield everything of the examples that decides their tokens."""
    for name in ("text", "text_pair", "prompt", "answer", "turns"):
        if name in examples.table.column_names:
            # The templates of prompts and answers are already filled in, so their result stands for them.
            for text in examples.table[name].to_pylist():
                yield f"{name}{len(text)}:{text}".encode("utf-8", "surrogatepass")
    if examples.conversations:
        yield examples.table["context"].to_numpy().tobytes()
