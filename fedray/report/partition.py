"""Figures of the data before anything is trained: which client holds what."""

import re

import numpy as np
import pandas as pd

from fedray.report.figure import Axis, Bars, Card, Figure, FloatArray, Heat, Line, Lines, array
from fedray.types import SPLITS

BARS = 40
"""Clients up to which each has a bar; more are drawn as a curve, the largest first."""
NAMED = {"class": "classes", "task": "tasks"}
"""What is counted, by the values of the column `kind` of partition.parquet."""


def partition_cards(partition: pd.DataFrame) -> tuple[list[Card], list[str]]:
    """Return the matrices of clients and classes or tasks, the numbers of examples, and what is missing.

    Args:
        partition: partition.parquet; empty if the run is one of an earlier version.
    """
    if partition.empty:
        return [], ["This run has no partition.parquet, which later versions write: its partition is not drawn."]
    cards, notes = [], []
    for kind, plural in NAMED.items():
        views = {}
        for split in SPLITS:
            rows = partition[(partition["kind"] == kind) & (partition["split"] == split)]
            if len(rows):
                views[f"{split} examples"] = _heat(partition, rows, kind, plural, split)
        if views:
            cards.append(Card(f"Clients and {plural}", views))
    if not cards:
        notes.append("The examples have neither classes nor several tasks, so only their numbers are drawn.")
    cards.append(Card.of(_sizes(partition)))
    return cards, notes


def _heat(partition: pd.DataFrame, rows: pd.DataFrame, kind: str, plural: str, split: str) -> Figure:
    columns = sorted(partition[partition["kind"] == kind]["name"].unique(), key=_natural)
    clients = list(dict.fromkeys(partition["client"]))
    found = rows.pivot_table(index="client", columns="name", values="examples", aggfunc="sum")
    counts = found.reindex(index=clients, columns=columns).to_numpy(float)
    order = _similar_first(counts)
    return Figure(
        f"partition-{kind}-{split}",
        f"{split.capitalize()} examples by client and {kind}",
        Axis(kind),
        Axis("client"),
        Heat(tuple(clients[i] for i in order), tuple(columns), counts[order], f"{split} examples"),
        f"{len(clients):,} clients, {len(columns):,} {plural if len(columns) != 1 else kind}. Clients are ordered by "
        f"the {kind} of which they hold most; where nothing is drawn, a client holds none.",
    )


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts `class 2` before `class 10`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _similar_first(counts: FloatArray) -> FloatArray:
    """Return the order of the rows: by the column of the largest value, then by its share, the largest first."""
    filled = np.nan_to_num(counts)
    share = filled.max(axis=1) / np.maximum(filled.sum(axis=1), 1)
    order: FloatArray = np.lexsort((-share, filled.argmax(axis=1)))
    return order


def _sizes(partition: pd.DataFrame) -> Figure:
    table = partition[partition["kind"] == "all"].pivot_table(
        index="client", columns="split", values="examples", aggfunc="sum", sort=False
    )
    table = table.reindex(columns=[split for split in SPLITS if split in table]).fillna(0)
    table = table.iloc[np.argsort(-table.sum(axis=1).to_numpy(), kind="stable")]
    title, of_clients = "Examples of every client", f"{len(table):,} clients, the largest first."
    if len(table) <= BARS:
        bars = Bars(tuple(map(str, table.index)), {str(split): array(table[split]) for split in table})
        return Figure("client-sizes", title, Axis("examples"), Axis("client"), bars, of_clients)
    ranks = np.arange(1, len(table) + 1, dtype=float)
    lines = [Line(str(split), index, ranks, array(table[split])) for index, split in enumerate(table)]
    axis = Axis("client, the largest first (rank)")
    return Figure("client-sizes", title, axis, Axis("examples of a client"), Lines(tuple(lines)), of_clients)
