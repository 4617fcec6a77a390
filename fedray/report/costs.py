"""Figures of what a run cost: memory, traffic, and clients whose work did not count."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from fedray.report.curves import POINTS
from fedray.report.figure import BYTES, SECONDS, Axis, Bars, Card, Figure, Line, Lines, array, thinned, unit_of
from fedray.report.scores import Styles
from fedray.report.tables import RunTables, by_seed_mean
from fedray.types import round_number

MISSED = {"late": "stragglers", "dropped_out": "dropped out", "left_out": "left out"}
"""Columns of rounds.parquet with clients whose work did not count."""


def memory_card(tables: RunTables) -> tuple[Card | None, str]:
    """Return predicted and measured peaks, and why there are none."""
    memory = tables.memory
    if memory.empty:
        return None, "No memory was measured: the run has no memory.parquet."
    place = np.where(memory["device"] == "cuda", "device", "host")
    for kind in ("predicted", "measured"):
        on_device, on_host = (array(memory[f"{kind}_{where}"]) for where in ("device", "host"))
        memory = memory.assign(**{kind: np.where(place == "device", on_device, on_host)})
    largest = memory.groupby(["method", "tier"], sort=False)[["predicted", "measured"]].max()
    if not largest.notna().any().any():
        return None, "The run neither predicted nor measured memory."
    size, unit = unit_of(largest.to_numpy(float).ravel(), BYTES)
    tiers = memory["tier"].nunique() > 1
    names = tuple(f"{method}, {tier}" if tiers else str(method) for method, tier in largest.index)
    values = {kind: array(largest[kind]) / size for kind in ("predicted", "measured")}
    of = "of the GPU" if (place == "device").all() else "of the process beyond its start"
    figure = Figure(
        "memory",
        "Peak memory of a client actor, predicted and measured",
        Axis(f"peak memory {of} ({unit})"),
        Axis("method and tier" if tiers else "method"),
        Bars(names, values, stacked=False),
        "Measured: of the actor with the highest peak. docs/memory.md explains what is counted where.",
    )
    return Card.of(figure), ""


def traffic_card(tables: RunTables) -> Card:
    """Return the bytes sent in both directions, in all rounds, and per client and round."""
    rounds = tables.rounds[tables.rounds["phase"] == "train"]
    columns = {"up, from the clients": "uplink_bytes", "down, to the clients": "downlink_bytes"}
    totals = rounds.groupby(["method", "run"])[[*columns.values(), "clients"]].sum().groupby("method").mean()
    totals = totals.reindex([method for method in tables.methods if method in totals.index])
    views = {}
    for view, key, by, what in (
        ("all rounds", "traffic", None, "sent in all rounds, by all clients"),
        ("a client's round", "traffic-per-client", "clients", "sent per client and round, on average"),
    ):
        shown = totals if by is None else totals.div(totals[by].where(totals[by] > 0), axis=0)
        size, unit = unit_of(shown[list(columns.values())].sum(axis=1).to_numpy(float), BYTES)
        bars = Bars(tuple(map(str, shown.index)), {name: array(shown[c]) / size for name, c in columns.items()})
        views[view] = Figure(
            key, f"Traffic by direction: {view}", Axis(f"{what} ({unit})"), Axis("method"), bars, _traffic_note()
        )
    return Card("Traffic by direction", views)


def _traffic_note() -> str:
    return "Arrays that the method sends, without protocol. The final pass is not counted."


def time_card(tables: RunTables) -> Card:
    """Return how long the methods took, on the tiers' devices and on this machine."""
    rows = [(one.method, one.simulated_seconds, one.wall_seconds) for run in tables.runs for one in run.summaries]
    frame = pd.DataFrame(rows, columns=["method", "simulated", "here"]).groupby("method", sort=False).mean()
    views = {}
    for view, column, what in (
        ("simulated", "simulated", "simulated duration of all rounds on the tiers' devices"),
        ("on this machine", "here", "duration on the machine that ran it, with the final pass"),
    ):
        size, unit = unit_of(frame[column].to_numpy(float), SECONDS)
        bars = Bars(tuple(map(str, frame.index)), {view: array(frame[column]) / size})
        views[view] = Figure(f"time-{column}", f"Time: {view}", Axis(f"{what} ({unit})"), Axis("method"), bars)
    return Card("Time", views)


def missed_card(tables: RunTables, styles: Styles) -> tuple[Card | None, str]:
    """Return the clients whose work did not count, and what to say if there were none."""
    rounds = tables.rounds[tables.rounds["phase"] == "train"]
    columns = [name for name in MISSED if name in rounds]
    if not rounds[columns].to_numpy().any():
        return None, "Every selected client took part in every round: no stragglers, none dropped out or was left out."
    per_run = rounds.groupby(["method", "run"])[columns].sum().groupby("method").mean()
    per_run = per_run.reindex([method for method in tables.methods if method in per_run.index])
    bars = Bars(tuple(map(str, per_run.index)), {MISSED[name]: array(per_run[name]) for name in columns})
    views = {
        "all rounds": Figure(
            "missed",
            "Selected clients whose work did not count",
            Axis("client updates, summed over all rounds"),
            Axis("method"),
            bars,
            "Stragglers would arrive after the deadline; clients dropped out by their tier's probability; clients that "
            "were left out failed or sent an unusable update.",
        ),
        "by round": _missed_by_round(tables, rounds.assign(missed=rounds[columns].sum(axis=1)), styles),
    }
    return Card("Stragglers, dropped and left-out clients", views), ""


def _missed_by_round(tables: RunTables, rounds: pd.DataFrame, styles: Styles) -> Figure:
    means = by_seed_mean(rounds, ["method", "server_round"], {"missed": "missed"})
    lines: list[Line] = []
    for method in _distinct(means, tables.methods):
        mine = means[means["method"] == method].sort_values("server_round")
        mine = mine.iloc[thinned(len(mine), POINTS)]
        x = array(mine["server_round"].map(round_number))
        lines.append(Line(method, styles.get(method), x, array(mine["missed"])))
    return Figure(
        "missed-by-round",
        "Selected clients whose work did not count, by round",
        Axis("round", whole=True),
        Axis("clients of the round"),
        Lines(tuple(lines)),
        "Methods with identical numbers in every round share the line of the first of them.",
    )


def _distinct(means: pd.DataFrame, methods: Sequence[str]) -> list[str]:
    """Return the methods without those that equal an earlier one in every round: cohorts are the same for all."""
    seen: set[tuple[float, ...]] = set()
    kept = []
    for method in methods:
        values = tuple(means[means["method"] == method].sort_values("server_round")["missed"])
        if values and values not in seen:
            seen.add(values)
            kept.append(method)
    return kept
