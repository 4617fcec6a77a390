"""Partitions of small examples."""

from collections import Counter
from typing import Any

import numpy as np

from fedray.config.partition import PARTITIONERS
from fedray.data.examples import Examples
from fedray.data.partition import Partition, partition


def assign(examples: Examples, kind: str, clients: int | None, seed: int = 0, **settings: Any) -> Partition:
    return partition(examples, PARTITIONERS.parse({"kind": kind} | settings), clients, seed)


def abc(count: int) -> list[str]:
    """Labels a, b, c, a, b, c, ..."""
    return list("abc" * count)


def rows_of(result: Partition) -> list[int]:
    return sorted(int(row) for splits in result.values() for rows in splits.values() for row in rows)


def histogram(examples: Examples, rows: np.ndarray) -> Counter[str]:
    return Counter(examples.field("label")[rows].tolist())
