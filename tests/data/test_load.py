"""All of `fedray.data`: from a configuration to one shard per client, on generated and on real text."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chats import byte_level
from transformers import PreTrainedTokenizerBase

from fedray.config import Config
from fedray.data.load import load_federated_data
from fedray.data.shards import FederatedData
from fedray.errors import ConfigError, DataError
from fedray.models.tokenizer import byte_tokenizer
from fedray.types import SPLITS

Configure = Callable[..., Config]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer()


def sizes(data: FederatedData, split: str) -> list[int]:
    return [shard.tables[split].num_rows for shard in data.shards.values()]  # type: ignore[index]


def synthetic(configure: Configure, seed: int = 0, **settings: Any) -> Config:
    data = {"source": "synthetic", "examples_per_client": 40} | settings
    return configure(data, {"kind": "by_file"}, clients={"count": 4}, seed=seed)


def test_shards_hold_every_example_once_and_name_the_planted_groups(
    configure: Configure, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Of 40: test 10 (a quarter), then validation 5 (0.15 of 30 is 4.5, rounded up), 25 remain."""
    data = load_federated_data(synthetic(configure), tokenizer)
    assert list(data.shards) == [f"client_{k:03d}" for k in range(4)]
    assert [sizes(data, split) for split in SPLITS] == [[25] * 4, [5] * 4, [10] * 4]
    assert sorted(data.latent_group.values()) == [0, 0, 1, 1]
    assert data.label_names == ("animals", "food", "music", "sport")
    assert (data.pad_token_id, data.vocab_size) == (256, 259)


def test_a_partition_that_mixes_groups_has_no_latent_group(
    configure: Configure, tokenizer: PreTrainedTokenizerBase
) -> None:
    config = configure({"source": "synthetic"}, {"kind": "iid"}, clients={"count": 4})
    assert load_federated_data(config, tokenizer).latent_group == {}


def test_the_fingerprint_follows_content_and_assignment(
    configure: Configure, tokenizer: PreTrainedTokenizerBase
) -> None:
    first = load_federated_data(synthetic(configure), tokenizer)
    again = load_federated_data(synthetic(configure), tokenizer)
    assert first.fingerprint == again.fingerprint
    assert all(again.shards[k].tables == first.shards[k].tables for k in first.shards)
    others = [
        synthetic(configure, seed=1),
        synthetic(configure, conflict=0),
        configure({"source": "synthetic", "examples_per_client": 40}, {"kind": "iid"}, clients={"count": 4}),
    ]
    found = {load_federated_data(config, tokenizer).fingerprint for config in others}
    assert len(found | {first.fingerprint}) == 4


def test_docstrings_make_one_client_per_library(configure: Configure, tokenizer: PreTrainedTokenizerBase) -> None:
    data = {"source": "docstrings", "libraries": ["pandas", "stdlib"], "max_per_client": 20}
    loaded = load_federated_data(configure(data, {"kind": "by_file"}), tokenizer)
    assert list(loaded.shards) == ["pandas", "stdlib"]
    assert loaded.label_names == ("class", "function", "method", "module")
    causal = configure(data | {"prompt": "", "answer": "{text}"}, {"kind": "by_file"}, task="causal_lm")
    shard = load_federated_data(causal, tokenizer).shards["pandas"]
    assert shard.tables["train"].column_names == ["input_ids", "labels", "answer"]


def files(folder: Path, **splits: str) -> dict[str, str]:
    return {split: str(folder / path) for split, path in splits.items()}


ADAPTERS = ("ARC-Challenge", "ARC-Easy", "boolq", "openbookqa")
REAL: dict[str, tuple[Callable[[Path], dict[str, Any]], dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # name: data, other sections, partition, what must come out (train: before holdout splits)
    "clinc150": (
        lambda at: {
            "files": files(at / "clinc150", train="train.jsonl", validation="val.jsonl", test="test.jsonl"),
            "label": "intent",
        },
        {},
        {"kind": "by_column", "column": "domain"},
        {"train": 15000, "validation": 3000, "test": 4500, "labels": 150, "clients": 10},
    ),
    "banking77": (
        lambda at: {
            "files": files(at / "banking77", train="train.csv", test="test.csv"),
            "label": "category",
            "max_per_class": 10,
        },
        {"clients": {"count": 20}},
        {"kind": "dirichlet", "alpha": 0.3, "validation_fraction": 0},
        {"train": 770, "validation": 0, "test": 3080, "labels": 77, "clients": 20},
    ),
    "snips": (
        lambda at: {
            "files": files(at / "snips", train="train.jsonl", validation="valid.jsonl", test="test.jsonl"),
            "label": "intent",
        },
        {"clients": {"count": 10}},
        {"kind": "shards", "classes_per_client": 2},
        {"train": 13084, "validation": 700, "test": 700, "labels": 7, "clients": 10},
    ),
    "gsm8k": (
        lambda at: {
            "files": files(at / "gsm8k", train="train.jsonl", test="test.jsonl"),
            "prompt": "{question}\n",
            "max_examples": 2000,
            "max_test_examples": 300,
        },
        {"clients": {"count": 8}, "task": "causal_lm"},
        {"kind": "quantity_skew", "alpha": 1.0, "validation_fraction": 0},
        {"train": 2000, "validation": 0, "test": 300, "labels": 0, "clients": 8},
    ),
    "dolly15k_fed10": (
        lambda at: {
            "files": files(at / "dolly15k_fed10", train="client_*.jsonl", test="test.jsonl"),
            "prompt": "{instruction}\n{context}\n",
            "answer": "{response}",
            "max_examples": 2000,
        },
        {"task": "causal_lm"},
        {"kind": "by_file", "validation_fraction": 0},
        {"train": 2000, "validation": 0, "test": 80, "labels": 0, "clients": 10},
    ),
    "llm_adapters": (
        lambda at: {
            "files": {n: files(at / "llm_adapters" / n, train="train.json", test="test.json") for n in ADAPTERS},
            "prompt": "{instruction}\n",
            "answer": "{output}",
            "max_examples": 2000,
            "max_test_examples": 500,
        },
        {"task": "causal_lm"},
        {"kind": "distinct_task", "validation_fraction": 0},
        {"train": 2000, "validation": 0, "test": 500, "labels": 0, "clients": 4},
    ),
    "tinyshakespeare": (
        lambda at: {
            "files": files(at / "tinyshakespeare", train="by_speaker.jsonl"),
            "prompt": "",
            "answer": "{text}",
        },
        {"task": "causal_lm", "clients": {"count": 52}},
        {"kind": "by_column", "column": "speaker", "validation_fraction": 0, "test_fraction": 0, "min_examples": 50},
        {"clients": 52},
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_real_text_loads_and_partitions(
    shared_data: Path, configure: Configure, tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    make, sections, partition, expected = REAL[name]
    config = configure({"source": "files"} | make(shared_data), partition, **sections)
    data = load_federated_data(config, tokenizer)
    found = {split: sum(sizes(data, split)) for split in SPLITS}
    found |= {"labels": len(data.label_names), "clients": len(data.shards)}
    assert found | expected == found
    assert min(sizes(data, "train")) >= config.partition.min_examples
    if expected.get("test"):
        assert min(sizes(data, "test")) >= 1


TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]


def chats(folder: Path, columns: dict[str, Any]) -> dict[str, Any]:
    """Return the section `data` of twelve rows with two topics."""
    rows = [columns | {"topic": "ab"[i % 2]} for i in range(12)]
    (folder / "chats.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return {"source": "files", "files": {"train": str(folder / "chats.jsonl")}, "max_length": 64}


def test_conversations_have_natural_clients_and_an_end_of_their_own(
    configure: Callable[..., Config], tmp_path: Path
) -> None:
    """Generation may end with the token that ends a turn, or a text; a chat template must have something to do."""
    by_topic = {"kind": "by_column", "column": "topic", "min_examples": 2}
    tokenizer = byte_level(["<|im_start|>", "<|im_end|>"])
    data = chats(tmp_path, {"messages": TURNS})
    config = configure(data | {"chat_template": "chatml"}, by_topic, task="causal_lm", method="fedavg")
    found = load_federated_data(config, tokenizer)
    assert sorted(found.shards) == ["a", "b"]
    assert found.end_token_ids == (258, tokenizer.convert_tokens_to_ids("<|im_end|>"))
    assert found.notes[0].startswith("instruction data in the format 'messages', detected from the column 'messages'")
    texts = chats(tmp_path, {"prompt": "Hi", "completion": "Yes"})
    config = configure(texts, by_topic, task="causal_lm")
    assert load_federated_data(config, tokenizer).end_token_ids == (258,)
    config = configure(texts | {"chat_template": "chatml"}, by_topic, task="causal_lm")
    with pytest.raises(DataError, match=r"data\.chat_template: the data are prompts and answers as texts"):
        load_federated_data(config, tokenizer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "alpaca", "prompt": "{instruction}"}, "data.format: 'alpaca' has columns of its own"),
        ({"format": "alpacca"}, "data.format: got 'alpacca'"),
        ({"chat_template": "."}, None),
    ],
)
def test_a_format_is_checked_when_it_is_configured(
    configure: Callable[..., Config], settings: dict[str, Any], message: str | None
) -> None:
    data = {"source": "files", "files": {"train": "-"}} | settings
    if message is not None:
        with pytest.raises(ConfigError, match=message):
            configure(data, task="causal_lm")
    with pytest.raises(ConfigError, match=f"data.{next(iter(settings))}: "):
        configure(data)  # a task with labels
