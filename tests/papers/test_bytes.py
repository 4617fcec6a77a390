"""What a published experiment sends, counted from the kit and the shapes of its model alone."""

from pathlib import Path

import pytest

from fedray.config import load_config
from fedray.experiment.outline import costs_from_configuration

PAPERS = Path(__file__).parents[2] / "jobs" / "papers"
MISTRAL_7B = {
    "model_type": "mistral",
    "vocab_size": 32_768,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 14_336,
}
"""The configuration of mistralai/Mistral-7B-v0.3."""


@pytest.mark.parametrize(
    ("task", "per_round", "gibibytes"),
    [("general", 2, 40.6), ("finance", 5, 101.6), ("medical", 2, 40.6), ("code", 2, 40.6)],
)
def test_the_traffic_of_flowertune(task: str, per_round: int, gibibytes: float) -> None:
    """LoRA of rank 32 on q (4096 to 4096) and v (4096 to 1024) of 32 blocks: 13,631,488 values; 4 bytes each, down and
    up, for every client of 200 rounds. The leaderboard prints 40.7 GB for two clients in a round, and allows 200,000
    MiB."""
    config = load_config(
        PAPERS / f"k9_flowertune_{task}.yaml",
        {"model.path": "random", "model.tokenizer": "bytes", "model.config": MISTRAL_7B},
    )
    (by_tier,) = costs_from_configuration(config).values()
    (cost,) = by_tier.values()
    values = 32 * 32 * ((4096 + 4096) + (4096 + 1024))
    assert values == 13_631_488
    assert (cost.trainable, cost.downlink, cost.uplink) == (values, values, values)
    assert (cost.downlink_bytes, cost.uplink_bytes) == (4 * values, 4 * values)
    assert config.clients.per_round == per_round
    sent = (cost.downlink_bytes + cost.uplink_bytes) * per_round * config.rounds
    assert sent / 2**30 == pytest.approx(gibibytes, abs=0.05)
    assert sent < 200_000 * 2**20
