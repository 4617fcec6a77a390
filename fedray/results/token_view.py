"""Examples as tokens: what a model reads of each, and what it learns."""

from collections.abc import Iterator, Sequence
from itertools import islice, zip_longest

import pyarrow as pa
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from fedray.data.shards import FederatedData
from fedray.types import IGNORED, ClientId

READ = ("grey78 on grey15", "grey78 on grey23")
LEARNED = ("white on dark_green", "white on green4")
"""Styles of neighbouring tokens, so that their borders are seen."""
BEFORE = 8
"""Tokens before one that may decide how it is written: whether it begins a word, or completes a letter."""
PART = "…"
"""A token with some bytes of a letter, which a later token completes, or without any text."""
VISIBLE = str.maketrans({" ": "·", "\t": "→", "\r": "␍", "\n": "↵\n"})


def show_examples(console: Console, data: FederatedData, tokenizer: PreTrainedTokenizerBase, count: int) -> None:
    """Print training examples token by token: one of each client, then the next of each, and so on.

    On a terminal, tokens with a loss are on green, the others on grey, and neighbours differ in shade. Elsewhere, `|`
    stands between tokens, and ⟦ ⟧ around those with a loss. Blanks are `·`, line breaks `↵`, tabs `→`.

    Args:
        count: number of examples.
    """
    colour = console.is_terminal and console.color_system is not None and not console.no_color
    if colour:
        console.print("tokens: ", Text(" read ", READ[1]), Text(" learned ", LEARNED[0]), sep="")
    else:
        console.print("tokens: read, ⟦learned⟧", highlight=False)
    for client, row in islice(_examples(data, count), count):
        console.print()
        console.print(_title(client, row, data), style="bold" if colour else None, highlight=False, markup=False)
        tokens = _tokens(row, tokenizer)
        console.print(_coloured(tokens) if colour else _bracketed(tokens), soft_wrap=not colour, highlight=False)


def _examples(data: FederatedData, count: int) -> Iterator[tuple[ClientId, pa.Table]]:
    """Yield training examples of all clients in turn, at most `count` of each, as tables of one row."""
    tables = {client: shard.tables["train"].slice(0, count) for client, shard in data.shards.items()}
    each = [[(client, table.slice(i, 1)) for i in range(table.num_rows)] for client, table in tables.items()]
    return (example for turn in zip_longest(*each) for example in turn if example is not None)


def _title(client: ClientId, row: pa.Table, data: FederatedData) -> str:
    size = len(row["input_ids"][0])
    label = row["labels"][0].as_py()
    if data.task == "causal_lm":
        learned = f"{sum(token != IGNORED for token in label):,} of them learned"
    elif data.task == "classification":
        learned = f"label {data.label_names[label]!r}, class {label}"
    else:
        learned = f"label {label:g}"
    return f"{client}: {size:,} tokens, {learned}"


def _tokens(row: pa.Table, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Return each token's text and whether it has a loss."""
    ids, labels = row["input_ids"][0].as_py(), row["labels"][0].as_py()
    learned = [label != IGNORED for label in labels] if isinstance(labels, list) else [False] * len(ids)
    return list(zip(token_texts(ids, tokenizer), learned, strict=True))


def token_texts(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return what each token adds to the text, or `PART`."""

    def text(start: int, stop: int) -> str:
        return str(tokenizer.decode(list(ids[start:stop]), clean_up_tokenization_spaces=False))

    found: list[str] = []
    whole = [0]  # where no letter is incomplete
    for i in range(len(ids)):
        start = whole[-BEFORE:][0]
        before, now = text(start, whole[-1]), text(start, i + 1)
        if now.endswith("\ufffd"):
            found.append(PART)
            continue
        found.append((now[len(before) :] if now.startswith(before) else text(i, i + 1)) or PART)
        whole.append(i + 1)
    return found


def _coloured(tokens: Sequence[tuple[str, bool]]) -> Text:
    text = Text()
    for i, (token, learned) in enumerate(tokens):
        text.append(token.translate(VISIBLE), (LEARNED if learned else READ)[i % 2])
    return text


def _bracketed(tokens: Sequence[tuple[str, bool]]) -> Text:
    text = ""
    was_learned = False
    for i, (token, learned) in enumerate(tokens):
        text += ("⟦" if learned else "⟧") if learned != was_learned else "|" if i else ""
        text += token.translate(VISIBLE)
        was_learned = learned
    return Text(text + "⟧" * was_learned)
