"""The smallest model that is worth a test."""

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
