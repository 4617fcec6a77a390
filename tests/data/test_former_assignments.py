"""Configurations without newer options assign the same examples to the same clients as before."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedray.config import Config
from fedray.data.load import load_federated_data
from fedray.models.tokenizer import byte_tokenizer

LIMITS = {"max_examples": 150, "max_per_class": 45, "max_test_examples": 30}
FORMER: list[tuple[dict[str, Any], dict[str, Any], int | None, str]] = [
    ({"kind": "iid"}, {}, 4, "91ee4987935e8245"),
    ({"kind": "dirichlet"}, LIMITS, 5, "e244758c6ff6e2f4"),
    ({"kind": "dirichlet", "alpha": 0.05, "column": "who"}, {}, 6, "320b03ae2938c4f1"),
    ({"kind": "shards"}, {}, 4, "ba999ca009ce105d"),
    ({"kind": "quantity_skew"}, LIMITS, 3, "2c2c5d3dce735171"),
    ({"kind": "mixed_task", "validation_fraction": 0}, {}, 3, "62af6f493214eaaf"),
    ({"kind": "by_column", "column": "who"}, {}, None, "f3a17126ce436c09"),
]


@pytest.mark.parametrize(("partition", "limits", "count", "fingerprint"), FORMER)
def test_the_fingerprint_is_the_former_one(
    configure: Callable[..., Config],
    tmp_path: Path,
    partition: dict[str, Any],
    limits: dict[str, int],
    count: int | None,
    fingerprint: str,
) -> None:
    for split, rows in (("train", 240), ("test", 60)):
        lines = [{"text": f"{split} {i}", "label": "abcd"[i % 4], "who": f"w{i % 7}"} for i in range(rows)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "test")}
    config = configure({"source": "files", "files": files} | limits, partition, clients={"count": count}, seed=5)
    assert load_federated_data(config, byte_tokenizer()).fingerprint[:16] == fingerprint
