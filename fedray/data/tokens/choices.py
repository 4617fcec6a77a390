"""Tokenises the options of multiple-choice examples, each as it would follow its prompt."""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from fedray.config import DataConfig
from fedray.data.examples import Examples
from fedray.data.shards import CHOICE, TOKENS
from fedray.data.tokens.cache import cached_table
from fedray.data.tokens.causal import CausalEncoder, TokenRow
from fedray.data.tokens.chat import MarkedText
from fedray.types import IGNORED

TEXTS_PER_CALL = 4096
"""Texts that the tokenizer gets at once."""


def tokenise_choices(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, data: DataConfig
) -> tuple[pa.ListArray, tuple[str, ...]]:
    """Return every example's options (list<CHOICE>), and what a user should know about them. The tokens come from the
    cache if they are there.

    Prompt and option are one text, as prompt and answer are (`CausalEncoder`), but no end-of-text token follows.

    Raises:
        ConfigError: the cache folder cannot be written.
    """
    table = examples.table
    options, right = table["choices"].to_pylist(), table["right"].to_pylist()
    prompts = table["prompt"].to_pylist()
    texts = [(prompt, text) for prompt, own in zip(prompts, options, strict=True) for text in own]
    tokens = cached_table(
        data.cache_dir,
        tokenizer,
        ("choices", data.max_length),
        (f"{len(prompt)}:{len(text)}:{prompt}{text}".encode("utf-8", "surrogatepass") for prompt, text in texts),
        len(texts),
        lambda: _tokenised(texts, CausalEncoder(tokenizer, data.max_length, ends=False)),
    )
    flat = pa.StructArray.from_arrays(
        [
            *(tokens[name].combine_chunks() for name in ("input_ids", "start")),
            pa.array([text.strip() for _, text in texts], pa.string()),
            pa.array([i == one for own, one in zip(options, right, strict=True) for i in range(len(own))], pa.bool_()),
        ],
        fields=list(CHOICE),
    )
    offsets = np.concatenate([[0], np.cumsum([len(own) for own in options])]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, flat), tuple(_notes(tokens, data.max_length))


def _tokenised(texts: Sequence[tuple[str, str]], encoder: CausalEncoder) -> pa.Table:
    """Return the tokens of each prompt and option, where those of the option begin, and what was cut."""
    rows = [
        row
        for start in range(0, len(texts), TEXTS_PER_CALL)
        for row in encoder([_marked(*pair) for pair in texts[start : start + TEXTS_PER_CALL]])
    ]
    return pa.table(
        {
            "input_ids": pa.array([row.input_ids for row in rows], TOKENS),
            "start": pa.array([_start(row) for row in rows], pa.int32()),
            "length": pa.array([row.length for row in rows], pa.int32()),
            "lost": pa.array([row.lost for row in rows], pa.int32()),
        }
    )


def _marked(prompt: str, option: str) -> MarkedText:
    text = prompt + option
    return MarkedText(text, ((len(prompt), len(text)),), len(text))


def _start(row: TokenRow) -> int:
    """Return where the option's tokens begin."""
    return next(place for place, label in enumerate(row.labels) if label != IGNORED)


def _notes(tokens: pa.Table, max_length: int) -> Iterator[str]:
    cut = int((tokens["length"].to_numpy() > max_length).sum())
    if cut:
        lost = int((tokens["lost"].to_numpy() > 0).sum())
        what = f"{lost:,} of them lose the end of the option" if lost else "all lose the start of the prompt only"
        yield f"data.max_length: {max_length} cuts {cut:,} of {len(tokens):,} options with their prompts; {what}"
