"""Instruction data from files to results: clients by a column, training, and generation that ends with the turn."""

import json
from pathlib import Path
from typing import Any

import pytest
from chats import LLAMA_3, byte_level, chat_tokenizer

import fedray

LAYERS = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}


def rows(name: str) -> list[dict[str, Any]]:
    """Return twelve rows with the same answers in one of the formats."""

    def row(i: int) -> dict[str, Any]:
        asked, said = f"Say {i}", ("ok", "yes")
        if name == "messages":
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said[0]}]
            return {"messages": [*turns, {"role": "user", "content": "?"}, {"role": "assistant", "content": said[1]}]}
        if name == "sharegpt":
            return {"conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": said[1]}]}
        if name == "alpaca":
            return {"instruction": asked, "input": "now" if i % 2 else "", "output": said[1]}
        return {"prompt": asked, "completion": f" {said[1]}"}

    return [row(i) | {"topic": "ab"[i % 2]} for i in range(12)]


def experiment(folder: Path, name: str, **sections: Any) -> dict[str, Any]:
    (folder / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows(name)))
    return {
        "rounds": 1,
        "method": {"name": "fedavg", "adapter": "full"},
        "task": "causal_lm",
        "model": {
            "path": "random",
            "tokenizer": str(folder / "tokenizer"),
            "config": {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32} | LAYERS,
        },
        "data": {
            "source": "files",
            "files": {"train": str(folder / "data.jsonl")},
            "max_length": 200,
            "cache_dir": str(folder / "cache"),
        },
        "partition": {"kind": "by_column", "column": "topic", "min_examples": 3},
        "train": {"epochs": 40, "batch_size": 4, "lr": 1e-2},
        "evaluation": {"metric": "exact_match", "max_new_tokens": 12},
        "device": "cpu",
        "runtime": "inline",
    } | sections


@pytest.mark.slow
@pytest.mark.parametrize("name", ["messages", "sharegpt", "alpaca", "prompt_completion"])
def test_generation_ends_with_the_turn(tmp_path: Path, name: str) -> None:
    """A model that has learned the answer gives exactly this answer: it starts where the assistant's turn does, and
    stops at the token that ends the turn, which is not the one that ends a text."""
    chat_tokenizer(LLAMA_3).save_pretrained(tmp_path / "tokenizer")
    found = fedray.run(experiment(tmp_path, name), output=tmp_path / "run")
    clients = found.clients()
    assert sorted(set(clients.client)) == ["a", "b"]
    assert found["fedavg"].personalised_mean == 1.0


@pytest.mark.slow
def test_alpaca_without_a_template_is_plain_text(tmp_path: Path) -> None:
    byte_level(bos="<bos>").save_pretrained(tmp_path / "tokenizer")
    data = experiment(tmp_path, "alpaca")["data"] | {"max_length": 400}
    found = fedray.run(experiment(tmp_path, "alpaca", data=data), output=tmp_path / "run")
    assert found["fedavg"].personalised_mean == 1.0
