"""Tokens: exact ids, the mask of the loss, and the cache. The byte tokenizer's token b is byte b."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from transformers import PreTrainedTokenizerBase

import fedray.data.tokens.tokenise as module
from fedray.config import DataConfig, ModelConfig, RawRows
from fedray.data.examples import Examples, assemble
from fedray.data.sources.files import Files
from fedray.errors import ConfigError
from fedray.models.tokenizer import byte_tokenizer, load_tokenizer
from fedray.types import Task

BOS, EOS = 257, 258


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer()


def config(folder: Path, **settings: Any) -> DataConfig:
    return Files.model_validate({"files": {"train": "-"}, "cache_dir": str(folder), "max_length": 12} | settings)


def examples(data: DataConfig, task: Task, **columns: list[Any]) -> Examples:
    return assemble([RawRows("here", columns, "train", "f", "t")], data, task)


def tokenise(content: Examples, tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> pa.Table:
    return module.tokenise(content, tokenizer, data).table


def test_texts_are_cut_at_the_end_and_labels_are_indices(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    data = config(tmp_path, max_length=5)
    table = tokenise(examples(data, "classification", text=["ab", "abcdef"], label=["z", "y"]), tokenizer, data)
    assert table["input_ids"].to_pylist() == [[BOS, 97, 98, EOS], [BOS, 97, 98, 99, EOS]]
    assert table["labels"].to_pylist() == [1, 0]
    assert table.schema.field("input_ids").type == pa.list_(pa.int32())
    assert table.schema.field("labels").type == pa.int32()
    assert table.column_names == ["input_ids", "labels"]


def test_regression_labels_are_float32(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    data = config(tmp_path)
    table = tokenise(examples(data, "regression", text=["a", "b"], label=[0.5, "2"]), tokenizer, data)
    assert table["labels"].to_pylist() == [0.5, 2.0]
    assert table["labels"].type == pa.float32()


def test_pairs_have_token_types_where_the_tokenizer_makes_them(
    tmp_path: Path, minilm: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """[CLS] hello [SEP] world [SEP] in BERT's vocabulary: 101 7592 102 2088 102."""
    data = config(tmp_path, text_pair="other")
    pair = examples(data, "classification", text=["hello", "hello"], other=["world", "hello"], label=["a", "b"])
    table = tokenise(pair, load_tokenizer(ModelConfig(path=str(minilm))), data)
    assert table["input_ids"][0].as_py() == [101, 7592, 102, 2088, 102]
    assert table["token_type_ids"][0].as_py() == [0, 0, 0, 1, 1]
    assert tokenise(pair, tokenizer, data).column_names == ["input_ids", "labels"]


def causal(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, q: str, a: str, prompt: str = "{q}?") -> dict[str, Any]:
    data = config(tmp_path, prompt=prompt, answer="{a}")
    (row,) = tokenise(examples(data, "causal_lm", q=[q], a=[a]), tokenizer, data).to_pylist()
    return dict(row)


def test_no_loss_on_the_prompt_and_loss_on_the_end_token(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    row = causal(tmp_path, tokenizer, "xy", "ab")
    assert row["input_ids"] == [BOS, *b"xy?", *b"ab", EOS]
    assert row["labels"] == [-100] * 4 + [*b"ab", EOS]
    assert row["answer"] == "ab"


def test_a_long_prompt_loses_its_start_but_not_the_start_token(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """12 tokens: 3 of answer and end leave 9 for bos and the prompt's last 8 bytes."""
    row = causal(tmp_path, tokenizer, "0123456789", "ab")
    assert row["input_ids"] == [BOS, *b"3456789?", *b"ab", EOS]
    assert row["labels"] == [-100] * 9 + [*b"ab", EOS]


def test_a_long_answer_leaves_a_quarter_to_the_prompt_and_loses_its_end(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """12 tokens: 3 for bos and the prompt's last 2 bytes, 9 for the answer, which then has no end token."""
    row = causal(tmp_path, tokenizer, "0123456789", "abcdefghijklm")
    assert row["input_ids"] == [BOS, *b"9?", *b"abcdefghi"]
    assert row["labels"] == [-100] * 3 + [*b"abcdefghi"]


def test_a_prompt_without_tokens_becomes_one_end_token(tmp_path: Path) -> None:
    """Such as GPT-2's: no bos in front, so an empty prompt would leave nothing to continue from."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    row = causal(tmp_path, tokenizer, "", "ab", prompt="{q}")
    assert row["input_ids"] == [EOS, *b"ab", EOS]
    assert row["labels"] == [-100, *b"ab", EOS]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever something is tokenised."""
    made: list[int] = []
    real = module._tokenised
    monkeypatch.setattr(module, "_tokenised", lambda *arguments: made.append(1) or real(*arguments))
    return made


def test_the_same_content_is_tokenised_once_and_mapped_from_the_file(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, calls: list[int]
) -> None:
    data = config(tmp_path)
    content = examples(data, "classification", text=["ab", "cd"], label=["x", "y"])
    first = tokenise(content, tokenizer, data)
    allocated = pa.total_allocated_bytes()
    again = tokenise(content, byte_tokenizer(), data)
    assert again.equals(first)
    assert len(calls) == 1
    assert pa.total_allocated_bytes() - allocated < again["labels"].nbytes + 128  # the tokens are the file's pages
    assert [path.suffix for path in (tmp_path / "tokens").iterdir()] == [".arrow"]


@pytest.mark.parametrize("change", ["text", "max_length", "tokenizer", "template"])
def test_whatever_changes_the_tokens_changes_the_key(tmp_path: Path, calls: list[int], change: str) -> None:
    def run(text: str = "ab", length: int = 12, prompt: str = "{text}", special: str = "<eos>") -> None:
        data = config(tmp_path, max_length=length, prompt=prompt, answer="{text}")
        tokenizer = byte_tokenizer()
        tokenizer.eos_token = special
        tokenise(examples(data, "causal_lm", text=[text, "b"]), tokenizer, data)

    run()
    run(
        **{"text": {"text": "cd"}, "max_length": {"length": 13}, "tokenizer": {"special": "<bos>"}}.get(
            change, {"prompt": "{text}."}
        )
    )
    assert len(calls) == 2


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "changed": lambda content: content.replace(bytes([97, 0, 0, 0]), bytes([99, 0, 0, 0])),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_file_is_built_anew(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, calls: list[int], damage: str
) -> None:
    data = config(tmp_path)
    content = examples(data, "classification", text=["aaaa", "cd"], label=["x", "y"])
    expected = tokenise(content, tokenizer, data).to_pydict()
    (path,) = (tmp_path / "tokens").iterdir()
    intact = path.read_bytes()
    damaged = DAMAGE[damage](intact)
    assert damaged != intact
    path.write_bytes(damaged)
    assert tokenise(content, tokenizer, data).to_pydict() == expected
    assert len(calls) == 2
    assert path.read_bytes() == intact


def test_a_cache_folder_that_cannot_be_written_names_its_setting(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "file").write_text("")
    data = config(tmp_path / "file")
    with pytest.raises(ConfigError, match=r"data\.cache_dir: .* cannot be written"):
        tokenise(examples(data, "classification", text=["a", "b"], label=["x", "y"]), tokenizer, data)


def test_more_rows_than_one_chunk_keep_their_order(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROWS_PER_CALL", 3)
    data = config(tmp_path)
    texts = [str(number) for number in range(10)]
    table = tokenise(examples(data, "classification", text=texts, label=list("ab" * 5)), tokenizer, data)
    assert table["input_ids"].to_pylist() == [[BOS, *text.encode(), EOS] for text in texts]
