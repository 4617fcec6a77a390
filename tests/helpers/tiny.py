"""The smallest model and the smallest experiment that are worth a test."""

from typing import Any


def tiny_bert(**fields: Any) -> dict[str, Any]:
    """Return the section `model` for a BERT with random weights that reads bytes. fields: of its configuration."""
    config = {
        "model_type": "bert",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    return {"path": "random", "tokenizer": "bytes", "config": config | fields}


def tiny_experiment() -> dict[str, Any]:
    """Return an experiment of seconds: every method, two tiers, a random BERT."""
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


TINY_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
}
"""The configuration of a decoder of one block."""
