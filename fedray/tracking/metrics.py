"""What trackers log of a round: the columns of rounds.parquet, by the names under which trackers show them."""

import math
import re
from collections.abc import Mapping
from typing import Any

from fedray.types import round_number

SCORE = re.compile(
    r"(?P<of>(validation_|common_)?(aggregated|personalised)(_weighted)?)_(?P<over>mean|min|max)|(?P<server>common_server)"
)
"""Columns of the metric; the others are what their names say."""

KEYS = ("method", "phase", "server_round")


def round_metrics(row: Mapping[str, Any], label: str) -> tuple[dict[str, float], int]:
    """Return the metrics of one row of rounds.parquet, and their step: the round, from 1.

    `personalised_mean` becomes METHOD/personalised_LABEL, `personalised_min` METHOD/personalised_LABEL_min. The scores
    and the loss of the final pass are METHOD/final_..., at the step of the last round. Undefined values are left out.

    Args:
        label: of the metric.
    """
    final = row["phase"] == "final"
    found = {}
    for column, value in row.items():
        score = SCORE.fullmatch(column)
        if column in KEYS or (final and score is None and column != "train_loss"):
            continue
        if isinstance(value, int | float) and math.isfinite(value):
            name = column if score is None else _name(score, label)
            found[f"{row['method']}/{'final_' if final else ''}{name}"] = float(value)
    return found, row["server_round"] if final else round_number(row["server_round"])


def _name(score: re.Match[str], label: str) -> str:
    if score["server"]:
        return f"{score['server']}_{label}"
    return f"{score['of']}_{label}" + ("" if score["over"] == "mean" else f"_{score['over']}")


def totals(row: Mapping[str, Any], before: Mapping[str, float]) -> dict[str, float]:
    """Return what accuracy can be drawn over: the bytes that were sent in both directions up to a round, and how long
    the rounds took on the clients' devices. The final pass, in which nothing is sent to the server, does not count.

    Args:
        row: of the round in rounds.parquet.
        before: the totals up to the round before; empty for the first one.
    """
    counts = row["phase"] == "train"
    sent = (row["uplink_bytes"] + row["downlink_bytes"]) * counts
    seconds = row["simulated_seconds"] * counts
    return {
        "total_bytes": before.get("total_bytes", 0) + sent,
        "total_simulated_seconds": before.get("total_simulated_seconds", 0.0) + seconds,
    }
