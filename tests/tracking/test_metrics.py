"""What is logged of a round: names and steps, derived by hand from rows of rounds.parquet."""

import math
from typing import Any

from fedray.tracking.metrics import round_metrics, totals

ROW: dict[str, Any] = {
    "method": "fedalt",
    "phase": "train",
    "server_round": 4,
    "clients": 3,
    "simulated_seconds": 2.5,
    "train_loss": None,
    "aggregated_mean": 0.5,
    "personalised_weighted_mean": 0.75,
    "personalised_max": math.nan,
    "validation_personalised_min": 0.25,
    "common_server": 1.0,
    "uplink_bytes": 30,
    "downlink_bytes": 70,
    "mixer": 0.125,
}


def test_names_and_step() -> None:
    """Scores have the metric's name; what is undefined is left out; the fifth round is step 5."""
    found, step = round_metrics(ROW, "f1")
    assert step == 5
    assert found == {
        "fedalt/clients": 3,
        "fedalt/simulated_seconds": 2.5,
        "fedalt/aggregated_f1": 0.5,
        "fedalt/personalised_weighted_f1": 0.75,
        "fedalt/validation_personalised_f1_min": 0.25,
        "fedalt/common_server_f1": 1,
        "fedalt/uplink_bytes": 30,
        "fedalt/downlink_bytes": 70,
        "fedalt/mixer": 0.125,
    }


def test_the_final_pass_has_scores_and_the_loss() -> None:
    """After five rounds its number is 5, which is the step of the fifth round."""
    found, step = round_metrics({**ROW, "phase": "final", "server_round": 5, "train_loss": 0.1}, "f1")
    assert step == 5
    assert found == {
        "fedalt/final_train_loss": 0.1,
        "fedalt/final_aggregated_f1": 0.5,
        "fedalt/final_personalised_weighted_f1": 0.75,
        "fedalt/final_validation_personalised_f1_min": 0.25,
        "fedalt/final_common_server_f1": 1,
    }


def test_totals() -> None:
    """100 bytes and 2.5 s per round; the final pass sends nothing to the server, and does not count."""
    first = totals(ROW, {})
    assert first == {"total_bytes": 100, "total_simulated_seconds": 2.5}
    second = totals(ROW, first)
    assert second == {"total_bytes": 200, "total_simulated_seconds": 5.0}
    assert totals({**ROW, "phase": "final"}, second) == second
