"""A real local Ray cluster of this test session's own: its own ports and temporary folder, ended by handle."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from tiny import tiny_bert

from fedray.runtime.driver import start_ray


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Two CPUs, and two GPUs that exist in Ray's books only. Unix socket paths are short, so the folder cannot
    lie under pytest's own."""
    folder = f"/tmp/fedray-test-{os.getpid()}"
    start_ray(
        address="local",
        num_cpus=2,
        num_gpus=2,
        include_dashboard=False,
        _temp_dir=folder,
        object_store_memory=200_000_000,
    )
    yield
    ray.shutdown()


@pytest.fixture
def tiny() -> dict[str, Any]:
    """An experiment of seconds: every method, two tiers, a random BERT."""
    return {
        "name": "tiny",
        "seed": 3,
        "rounds": 2,
        "method": [
            "local",
            "head_only",
            "fedavg",
            {"name": "fedavg", "label": "fedavg-reft", "adapter": "reft"},
            "fedreft",
            "fedalt",
            {"name": "fedhft", "warmup_rounds": 1},
            {"name": "fedhft", "label": "fedhft-pre", "timing": "pre", "warmup_rounds": 1},
        ],
        "model": tiny_bert(hidden_size=32, num_hidden_layers=2, intermediate_size=64),
        "data": {"source": "synthetic", "examples_per_client": 24, "max_length": 32},
        "partition": {"kind": "by_file"},
        "clients": {
            "count": 4,
            "per_round": 3,
            "tiers": {
                "strong": {"share": 0.5},
                "weak": {"share": 0.5, "mask_ratio": 0.5, "lora_rank": 4, "reft_layers": [1]},
            },
        },
        "lora": {"dropout": 0.1},
        "train": {"lr": 5e-3, "weight_decay": 0.1},
    }
