"""The smallest experiment whose report has every kind of figure."""

from typing import Any

from tiny import tiny_bert

REPORTED: dict[str, Any] = {
    "name": "tiny",
    "rounds": 2,
    "method": ["local", "fedreft", "fedalt", {"name": "fedhft", "warmup_rounds": 1, "clusters": 2}],
    "model": tiny_bert(max_position_embeddings=64),
    "data": {"source": "synthetic", "examples_per_client": 16, "max_length": 16},
    "partition": {"kind": "by_file"},
    "clients": {
        **{"count": 3, "example_seconds": 0.01, "deadline_s": 0.3},
        "tiers": {"strong": {"share": 0.5}, "weak": {"share": 0.5, "mask_ratio": 0.5, "speed": 0.3}},
    },
    "evaluation": {"every": 1},
    "device": "cpu",
    "runtime": "inline",
    "report": True,
}
"""Methods that record numbers of their own, with stragglers, scores of every round, and a report."""
