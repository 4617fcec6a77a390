"""Multiple choice from files to results: what is learned is chosen, every example has its value, and clients that are
trained in one step have the same."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from tiny import TINY_LLAMA

import fedray

OPTIONS = {"text": ["red", "blue", "green"], "label": ["A", "B", "C"]}


def experiment(folder: Path, **sections: Any) -> dict[str, Any]:
    """Every question about the sky is answered by B."""
    rows = [{"question": f"sky {i}", "choices": OPTIONS, "answerKey": "B"} for i in range(24)]
    (folder / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "rounds": 2,
        "method": {"name": "fedavg", "adapter": "full"},
        "task": "causal_lm",
        "model": {"path": "random", "tokenizer": "bytes", "config": TINY_LLAMA},
        "data": {
            "source": "files",
            "files": {"train": str(folder / "quiz.jsonl")},
            "prompt": "{question}:",
            "answer": " {answerKey}",
            "choices": "choices",
            "max_length": 24,
            "cache_dir": str(folder / "cache"),
        },
        "clients": {"count": 2},
        "train": {"epochs": 15, "batch_size": 4, "lr": 1e-2},
        "evaluation": {
            "metrics": ["multiple_choice", {"name": "multiple_choice", "normalise": "characters"}],
            "examples": True,
        },
        "device": "cpu",
        "runtime": "inline",
        "storage_path": str(folder / "runs"),
    } | sections


def test_what_is_learned_is_chosen(tmp_path: Path) -> None:
    result = fedray.run(experiment(tmp_path))
    table, kept = result.evaluations(), result.examples()
    last = table[(table.phase == "final") & (table.moment == "personalised") & (table.examples == "test")]
    assert set(last.metric) == {"multiple_choice", "multiple_choice_characters"}
    assert last.value.tolist() == pytest.approx([1.0] * len(last))
    mine = kept[(kept.moment == "personalised") & (kept.examples == "test")]
    for metric, rows in last.groupby("metric"):
        means = mine.groupby("client")[metric].mean()
        assert means[rows.client].tolist() == pytest.approx(rows.value.tolist())
    fused = fedray.run(experiment(tmp_path, clients={"count": 2, "fuse": 2})).examples()
    columns = ["client", "example", "moment", "examples", "multiple_choice", "multiple_choice_characters"]
    pd.testing.assert_frame_equal(kept[columns], fused[columns])
