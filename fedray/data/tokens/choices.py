"""Tokenises the options of multiple-choice examples, each as it would follow its prompt."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from fedray.data.examples import Examples
from fedray.data.shards import CHOICE, TOKENS
from fedray.data.tokens.causal import CausalEncoder, TokenRow
from fedray.data.tokens.chat import MarkedText
from fedray.types import IGNORED

TEXTS_PER_CALL = 4096
"""Texts that the tokenizer gets at once."""


def tokenise_choices(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[pa.ListArray, tuple[str, ...]]:
    """Return every example's options (list<CHOICE>), and what a user should know about them.

    Prompt and option are one text, as prompt and answer are (`CausalEncoder`), but no end-of-text token follows.
    """
    table = examples.table
    options, right = table["choices"].to_pylist(), table["right"].to_pylist()
    prompts = table["prompt"].to_pylist()
    texts = [_marked(prompt, text) for prompt, own in zip(prompts, options, strict=True) for text in own]
    rows = list(_encoded(texts, CausalEncoder(tokenizer, max_length, ends=False)))
    flat = pa.StructArray.from_arrays(
        [
            pa.array([row.input_ids for row in rows], TOKENS),
            pa.array([_start(row) for row in rows], pa.int32()),
            pa.array([text.strip() for own in options for text in own], pa.string()),
            pa.array([i == one for own, one in zip(options, right, strict=True) for i in range(len(own))], pa.bool_()),
        ],
        fields=list(CHOICE),
    )
    offsets = np.concatenate([[0], np.cumsum([len(own) for own in options])]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, flat), tuple(_notes(rows, max_length))


def _marked(prompt: str, option: str) -> MarkedText:
    text = prompt + option
    return MarkedText(text, ((len(prompt), len(text)),), len(text))


def _encoded(texts: list[MarkedText], encoder: CausalEncoder) -> Iterator[TokenRow]:
    for start in range(0, len(texts), TEXTS_PER_CALL):
        yield from encoder(texts[start : start + TEXTS_PER_CALL])


def _start(row: TokenRow) -> int:
    """Return where the option's tokens begin."""
    return next(place for place, label in enumerate(row.labels) if label != IGNORED)


def _notes(rows: list[TokenRow], max_length: int) -> Iterator[str]:
    cut = sum(row.length > max_length for row in rows)
    if cut:
        lost = sum(row.lost > 0 for row in rows)
        what = f"{lost:,} of them lose the end of the option" if lost else "all lose the start of the prompt only"
        yield f"data.max_length: {max_length} cuts {cut:,} of {len(rows):,} options with their prompts; {what}"
