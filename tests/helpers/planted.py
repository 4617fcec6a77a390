"""Eight clients in two groups whose labels contradict each other, and training that makes their updates differ."""

from typing import Any

PLANTED: dict[str, Any] = {
    "seed": 4,
    "clients__count": 8,
    "data__groups": 2,
    "data__examples_per_client": 60,
    "data__max_length": 80,
    "train__epochs": 3,
    "train__lr": 0.02,
    "train__weight_decay": 0.0,
    "lora__rank": 4,
    "lora__dropout": 0.0,
}
"""Changes of the tests' experiment (`start`)."""
