"""What a user should know about the tokens of the examples: what was cut, and where prompt and answer share a token."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from fedray.data.shards import last_answer


def token_notes(tokens: pa.Table, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Iterator[str]:
    """Yield one sentence per thing that a user should know.

    Args:
        tokens: with the measures of `TokenRow`: `length`, and for causal_lm `lost` and `shared`.
    """
    lengths = tokens["length"].to_numpy()
    longer = lengths[lengths > max_length]
    if len(longer):
        note = (
            f"data.max_length: {max_length} cuts {len(longer):,} of {len(lengths):,} examples; the longest has "
            f"{longer.max():,} tokens, and half of the cut ones lose {int(np.median(longer)) - max_length:,} or more"
        )
        if "lost" in tokens.column_names:
            answers = int(np.count_nonzero(tokens["lost"].to_numpy()))
            what = f"{answers:,} of them lose the end of the answer and the token that ends it"
            note += f"; {what if answers else 'no answer is cut'}"
        yield note
    if "shared" not in tokens.column_names:
        return
    if not tokenizer.is_fast:
        yield (
            f"the tokenizer {type(tokenizer).__name__} does not say which characters a token stands for: prompts and "
            "answers are tokenised apart, and may have other tokens than as one text"
        )
    shared = tokens["shared"].to_numpy()
    rows = np.flatnonzero(shared)
    if len(rows):
        row = int(rows[0])
        ids, labels = (np.asarray(tokens[name][row].as_py()) for name in ("input_ids", "labels"))
        token = tokenizer.decode([ids[last_answer(labels)]], clean_up_tokenization_spaces=False)
        text = tokens["answer"][row].as_py()
        yield (
            f"a token spans the border between prompt and answer in {len(rows):,} of {len(shared):,} examples, for "
            f"example {token!r} of the answer {text[:40]!r}, of which {text[: shared[row]]!r} ends the prompt; it "
            "counts as answer, and generation starts before it: a prompt should not end in a blank or within a word"
        )
