"""Three of ten clients send the opposite of what they learned, five times as large: plain averaging is broken, the
geometric median of everybody else holds. What clients learn is given, so that nothing but the aggregation decides."""

from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_bert

import fedray

HOSTILE = 3
CONFIG: dict[str, Any] = {
    "name": "hostile",
    "rounds": 6,
    "model": tiny_bert(),
    "data": {"source": "synthetic", "examples_per_client": 12, "max_length": 16},
    "partition": {"kind": "by_file"},
    "clients": {"count": 10},
    "reft": {"rank": 2},
    "train": {"max_steps": 1},
    "evaluation": {"every": 0},
    "device": "cpu",
    "runtime": "inline",
}


def distances(folder: Path, hostile: int, aggregate: str) -> list[float]:
    """Return how far from the target what honest clients receive is in each round, as a part of its length."""
    entry = {"class": "hostile_clients.Opposed", "label": "m", "aggregate": aggregate, "mixing": "fixed", "lam": 1.0}
    result = fedray.run(CONFIG, method=[{**entry, "hostile": hostile}], output=folder / f"{aggregate}-{hostile}")
    table = result.clients().query("phase == 'train'").sort_values(["server_round", "client"])
    return [float(rows.away[HOSTILE:].mean()) for _, rows in table.groupby("server_round")]


@pytest.mark.parametrize("aggregate", ["mean", "geometric_median"])
def test_without_anybody_hostile_both_arrive(tmp_path: Path, aggregate: str) -> None:
    """Each round halves the way; what the noise of 0.05 leaves is small."""
    found = distances(tmp_path, 0, aggregate)
    assert found[0] > 0.9
    assert found[-1] < 0.1


def test_the_mean_breaks(tmp_path: Path) -> None:
    """Of everybody but an honest client, 6 step by 0.5 and 3 by −2.5: on average away from the target."""
    found = distances(tmp_path, HOSTILE, "mean")
    assert found == sorted(found)
    assert found[-1] > 3 * found[0]


def test_the_geometric_median_holds(tmp_path: Path) -> None:
    """As near as without anybody hostile, within twice the noise."""
    found = distances(tmp_path, HOSTILE, "geometric_median")
    assert found[-1] < 0.2
    assert found == sorted(found, reverse=True)
