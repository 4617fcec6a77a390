"""Examples as tokens: blanks, line breaks, letters of several tokens, special tokens, and what is learned."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from chats import byte_level, merged_bytes, sentencepiece_bpe, word_piece
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from fedray.config import load_config
from fedray.data.load import load_federated_data
from fedray.results.token_view import LEARNED, PART, READ, show_examples, token_texts

CHAT = [{"role": "user", "content": "é?"}, {"role": "assistant", "content": "a b\n\tc"}]


def shown(folder: Path, tokenizer: PreTrainedTokenizerBase, count: int, terminal: bool, **sections: Any) -> str:
    loaded = load_config(
        {
            "rounds": 1,
            "method": "fedavg",
            "model": {"path": "random", "config": {"model_type": "llama"}, "tokenizer": "bytes"},
            "partition": {"kind": "by_file", "test_fraction": 0, "validation_fraction": 0, "min_examples": 1},
        }
        | sections
    )
    out = StringIO()
    console = Console(file=out, width=100, force_terminal=terminal, color_system="truecolor" if terminal else None)
    show_examples(console, load_federated_data(loaded, tokenizer), tokenizer, count)
    return out.getvalue()


@pytest.fixture
def chats(tmp_path: Path) -> dict[str, Any]:
    for name in ("ann", "bob"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"messages": CHAT}) for _ in range(2)))
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("ann", "bob")}
    data = {"source": "files", "files": files, "chat_template": "plain", "cache_dir": str(tmp_path / "cache")}
    return {"task": "causal_lm", "data": data}


def test_without_a_terminal_brackets_show_what_is_learned(tmp_path: Path, chats: dict[str, Any]) -> None:
    text = shown(tmp_path, byte_level(), 3, False, **chats)
    example = "U|s|e|r|:|·|…|é|?|↵\n|↵\n|A|s|s|i|s|t|a|n|t|:⟦·|a|·|b|↵\n|→|c|<eos>⟧\n"
    titles = [f"\n{client}: 29 tokens, 8 of them learned\n" for client in ("ann", "bob", "ann")]
    assert text == "tokens: read, ⟦learned⟧\n" + "".join(title + example for title in titles)


def test_on_a_terminal_neighbours_differ_and_learned_tokens_are_highlighted(
    tmp_path: Path, chats: dict[str, Any]
) -> None:
    text = shown(tmp_path, byte_level(), 1, True, **chats)
    console = Console(color_system="truecolor")

    def codes(style: str) -> str:
        return console.get_style(style).render("x").partition("x")[0]

    assert f"{codes(READ[0])}:\x1b[0m{codes(LEARNED[1])}·\x1b[0m{codes(LEARNED[0])}a\x1b[0m" in text
    assert "⟦" not in text.partition("\n")[2]


def test_labels_are_shown_where_they_are_what_is_learned(tmp_path: Path) -> None:
    data = {"source": "files", "cache_dir": str(tmp_path / "cache")}
    (tmp_path / "a.csv").write_text("text,label\nab,joy\ncd,anger\n")
    (tmp_path / "b.csv").write_text("text,label\nab,2.5\ncd,1\n")
    files = {name: {"train": str(tmp_path / f"{name}.csv")} for name in "ab"}
    text = shown(tmp_path, byte_level(), 2, False, data=data | {"files": {"a": files["a"]}})
    assert "a: 2 tokens, label 'joy', class 1\na|b\n" in text
    text = shown(tmp_path, byte_level(), 2, False, data=data | {"files": {"b": files["b"]}}, task="regression")
    assert "b: 2 tokens, label 2.5\na|b\n" in text
    text = shown(tmp_path, byte_level(), 2, False, data=data | {"files": {"[red]b[/x]": files["a"]}})
    assert "[red]b[/x]: 2 tokens" in text


@pytest.mark.parametrize(
    ("tokenizer", "text", "expected"),
    [
        (merged_bytes(), "good world", ["good", " world"]),
        (merged_bytes(), "🙂 the", [PART, PART, PART, "🙂", " the"]),
        (sentencepiece_bpe(), "good world é", ["good", " world", " ", PART, "é"]),
        (word_piece(), "good yes.", ["good", " yes", "."]),
    ],
)
def test_tokens_are_written_as_they_read_in_the_text(
    tokenizer: PreTrainedTokenizerBase, text: str, expected: list[str]
) -> None:
    assert token_texts(tokenizer(text, add_special_tokens=False).input_ids, tokenizer) == expected


@given(st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=40))
def test_the_tokens_texts_make_the_text(text: str) -> None:
    tokenizer = merged_bytes()
    found = token_texts(tokenizer(text).input_ids, tokenizer)
    assert "".join(piece for piece in found if piece != PART or "…" in text).replace("…", "") == text.replace("…", "")
