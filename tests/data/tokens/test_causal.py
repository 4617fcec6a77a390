"""The border between prompt and answer: the joined text's tokens, and which of them have a loss."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chats import WORDS, byte_level, merged_bytes, sentencepiece_bpe, shown, unigram, word_piece
from hypothesis import given
from hypothesis import strategies as st
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from fedray.config import RawRows
from fedray.data.examples import assemble
from fedray.data.sources.files import Files
from fedray.data.tokens.causal import CausalEncoder, TokenRow
from fedray.data.tokens.chat import MarkedText
from fedray.data.tokens.tokenise import Tokenised, tokenise
from fedray.models.tokenizer import byte_tokenizer

TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "bytes": byte_tokenizer,
    "byte-level BPE": merged_bytes,
    "byte-level BPE, trimmed offsets": lambda: merged_bytes(trim_offsets=True),
    "SentencePiece BPE": sentencepiece_bpe,
    "unigram": unigram,
    "WordPiece": word_piece,
}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerBase]:
    return {name: make() for name, make in TOKENIZERS.items()}


def test_the_words_are_tokens(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    """What the borders below rely on."""
    for name in ("byte-level BPE", "byte-level BPE, trimmed offsets"):
        assert [len(tokenizers[name](word).input_ids) for word in WORDS] == [1] * len(WORDS)
    for name in ("SentencePiece BPE", "unigram"):
        ids = tokenizers[name]("good world the answer is", add_special_tokens=False).input_ids
        assert len(ids) == 5


def encoded(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, max_length: int = 1000) -> TokenRow:
    text = prompt + answer
    (row,) = CausalEncoder(tokenizer, max_length)([MarkedText(text, ((len(prompt), len(text)),), len(text))])
    return row


def marked(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> str:
    row = encoded(tokenizer, prompt, answer)
    return shown(tokenizer, row.input_ids, row.labels)


BORDERS = [
    ("byte-level BPE", "good", " world", "good⟦ world<eos>⟧", 0),
    ("byte-level BPE", "good ", "world", "good⟦ world<eos>⟧", 1),
    ("byte-level BPE, trimmed offsets", "good ", "world", "good⟦ world<eos>⟧", 1),
    ("byte-level BPE, trimmed offsets", "good", " world", "good⟦ world<eos>⟧", 0),
    ("byte-level BPE", "🙂", "🙃", "🙂⟦🙃<eos>⟧", 0),
    ("SentencePiece BPE", "good", " world", "<s> good⟦world</s>⟧", 0),
    ("SentencePiece BPE", "good ", "world", "<s> good⟦world</s>⟧", 1),
    ("SentencePiece BPE", "é", "🙃x", "<s> é⟦🙃x</s>⟧", 0),
    ("unigram", "the answer", " is", "the answer⟦is</s>⟧", 0),
    ("unigram", "the answer ", "is", "the answer⟦is</s>⟧", 1),
    ("WordPiece", "the answer ", "is here", "the answer⟦is here [SEP]⟧", 0),
    ("WordPiece", "the answer", " is here", "the answer⟦is here [SEP]⟧", 0),
    ("bytes", "a ", "b", "<bos>a ⟦b<eos>⟧", 0),
    ("bytes", "", "ab", "<bos>⟦ab<eos>⟧", 0),
    ("byte-level BPE", "", "good", "<eos>⟦good<eos>⟧", 0),
    ("WordPiece", "  ", "yes", "[SEP]⟦yes [SEP]⟧", 0),
]


@pytest.mark.parametrize(("name", "prompt", "answer", "expected", "shared"), BORDERS)
def test_a_token_on_the_border_belongs_to_the_answer(
    tokenizers: dict[str, PreTrainedTokenizerBase], name: str, prompt: str, answer: str, expected: str, shared: int
) -> None:
    row = encoded(tokenizers[name], prompt, answer)
    assert shown(tokenizers[name], row.input_ids, row.labels) == expected
    assert row.shared == shared
    assert row.answer == (prompt + answer)[len(prompt) - shared :]


words = st.sampled_from(["good", " ", "world", "the", "\n", "  ", "🙂", "é", "ﬁ", "x", ".\n\n", "日本", "answer is"])
texts = st.lists(words, max_size=8).map("".join)


@given(prompt=texts, answer=texts.filter(str.strip), name=st.sampled_from(list(TOKENIZERS)))
def test_the_tokens_are_those_of_the_joined_text(
    tokenizers: dict[str, PreTrainedTokenizerBase], prompt: str, answer: str, name: str
) -> None:
    """What a tokenizer makes of the joined text is what it makes of it without us; the tokens with a loss are the last
    ones, and stand at least for the answer: whatever comes before them is all in the prompt."""
    tokenizer = tokenizers[name]
    row = encoded(tokenizer, prompt, answer)
    whole = tokenizer(prompt + answer, add_special_tokens=False, verbose=False).input_ids
    first = next(i for i, label in enumerate(row.labels) if label != -100)
    after = row.input_ids[first:]
    assert row.labels == [-100] * first + after
    start = tokenizer("").input_ids[:1] if name in ("bytes", "SentencePiece BPE") else []
    end = tokenizer.eos_token_id
    if not start and after[:-1] == whole:
        start = [end]
    assert row.input_ids == [*start, *whole, end]
    if name in ("bytes", "byte-level BPE", "byte-level BPE, trimmed offsets"):
        # These decode to the bytes of the text, so that the answer's bytes are the last ones.
        assert tokenizer.decode(whole) == prompt + answer
        answer_bytes = tokenizer.decode(after, skip_special_tokens=True).encode()
        spelt = sum(len(tokenizer.convert_ids_to_tokens(token)) for token in after[:-1])
        assert spelt - len(answer.encode()) in range(len((prompt or "\0").encode()) + 1)
        assert row.shared == 0 or answer_bytes.endswith(answer.encode())
        assert row.shared or spelt == len(answer.encode())


def test_a_tokenizer_is_as_it_was(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    """Its post-processor, which begins and ends texts, is only switched off."""
    for tokenizer in tokenizers.values():
        before = tokenizer.backend_tokenizer.to_str(), tokenizer("good").input_ids
        encoded(tokenizer, "good", " world")
        assert (tokenizer.backend_tokenizer.to_str(), tokenizer("good").input_ids) == before


def test_nothing_is_added_that_a_text_already_has() -> None:
    """`<bos>` and `<eos>` in templates, as they are copied from the pages of models."""
    tokenizer = byte_level(bos="<bos>")
    assert marked(tokenizer, "<bos>a", "b<eos>") == marked(tokenizer, "a", "b") == "<bos>a⟦b<eos>⟧"


def table(folder: Path, tokenizer: PreTrainedTokenizerBase, rows: list[tuple[str, str]], **settings: Any) -> Tokenised:
    data = Files.model_validate({"files": {"train": "-"}, "cache_dir": str(folder)} | settings)
    prompts, answers = zip(*rows, strict=True)
    raw = RawRows("here", {"prompt": list(prompts), "answer": list(answers)}, "train")
    return tokenise(assemble([raw], data, "causal_lm"), tokenizer, data)


@pytest.mark.parametrize("cached", [False, True])
def test_a_token_on_the_border_is_noted(
    tmp_path: Path, tokenizers: dict[str, PreTrainedTokenizerBase], cached: bool
) -> None:
    rows = [("good", " world"), ("good ", "world"), ("x ", "the answer")]
    for _ in range(1 + cached):
        found = table(tmp_path, tokenizers["byte-level BPE"], rows)
    (note,) = found.notes
    assert "spans the border between prompt and answer in 2 of 3 examples" in note
    assert "' world' of the answer ' world', of which ' ' ends the prompt" in note
    assert found.table["answer"].to_pylist() == [" world", " world", " the answer"]
    assert found.table.column_names == ["input_ids", "labels", "answer"]


@pytest.mark.parametrize("cached", [False, True])
def test_cut_examples_are_noted(tmp_path: Path, cached: bool) -> None:
    """Bytes with <bos> and <eos>: 13, 10, 20 and 8 tokens. Of 10, the prompt keeps at least 2. The first loses 3 tokens
    of its prompt; the third 6 of its prompt and 4 of the 12 of its answer (11 and <eos>)."""
    rows = [("p" * 9, "ab"), ("p" * 6, "ab"), ("p" * 7, "a" * 11), ("p" * 4, "ab")]
    for _ in range(1 + cached):
        found = table(tmp_path, byte_tokenizer(), rows, max_length=10)
    assert found.notes == (
        "data.max_length: 10 cuts 2 of 4 examples; the longest has 20 tokens, and half of the cut ones lose 6 or more; "
        "1 of them lose the end of the answer and the token that ends it",
    )
    assert [len(row) for row in found.table["input_ids"].to_pylist()] == [10, 10, 10, 8]
    assert not table(tmp_path, byte_tokenizer(), rows, max_length=20).notes


def test_a_tokenizer_without_offsets_is_noted(tmp_path: Path) -> None:
    """ByT5's tokens are the bytes + 3; it has an end token and none that begins a text."""
    tokenizer = ByT5Tokenizer()
    found = table(tmp_path, tokenizer, [("a ", "b🙂")])
    assert found.table["input_ids"].to_pylist() == [[*(byte + 3 for byte in "a b🙂".encode()), 1]]
    assert found.table["labels"].to_pylist() == [[-100, -100, *(byte + 3 for byte in "b🙂".encode()), 1]]
    assert found.notes[0].startswith("the tokenizer ByT5Tokenizer does not say which characters")
