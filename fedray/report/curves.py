"""Learning curves: scores and losses by round, by bytes sent, and by simulated time."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from fedray.report.figure import BYTES, SECONDS, Axis, Card, Figure, Line, Lines, array, slug, thinned, unit_of
from fedray.report.scores import Styles, scale_of, score_axis
from fedray.report.tables import RunTables, by_seed_mean
from fedray.types import round_number

BANDS = 4
"""Lines in colour up to which they have bands; more bands would hide the lines."""
POINTS = 200
"""Points of a line at most."""


@dataclass(frozen=True)
class Curve:
    """What a card of curves shows.

    Attributes:
        column: of rounds.parquet.
        moment: whose quantiles over clients are the band around a line; empty for none.
    """

    key: str
    title: str
    column: str
    axis: str
    moment: str = ""


def curve_cards(tables: RunTables, styles: Styles) -> tuple[list[Card], list[str]]:
    """Return the cards of the scores and the losses, and what to say about those that are missing."""
    axis, label = score_axis(tables.metric), tables.metric.label.capitalize()
    wanted = [
        Curve("personalised", f"{label} after local training", "personalised_mean", axis, "personalised"),
        Curve("aggregated", f"{label} before local training", "aggregated_mean", axis, "aggregated"),
        Curve("common", f"{label} of the server's model on the common test set", "common_server", axis),
        Curve("loss", "Training loss", "train_loss", "training loss (nats, mean over clients, lower is better)"),
    ]
    cards, notes = [], []
    measured = tables.rounds[tables.rounds["phase"] == "train"]
    for curve in wanted:
        if curve.column in measured and measured[curve.column].notna().any():
            cards.append(_card(tables, curve, styles))
    scores = [name for name in ("personalised_mean", "aggregated_mean") if name in measured]
    if not measured[scores].notna().to_numpy().any():
        notes.append(
            "Scores were measured after the last round only; with evaluation.every: 1 they are measured in every round."
        )
    return cards, notes


def _card(tables: RunTables, curve: Curve, styles: Styles) -> Card:
    rows = tables.rounds.dropna(subset=[curve.column])
    keys = ["method", "phase", "server_round"]
    values = {"y": curve.column, "sent": "sent", "elapsed": "elapsed"}
    means = by_seed_mean(rows, keys, values)
    scale = 1.0 if curve.key == "loss" else scale_of(tables.metric)
    several = len(tables.seeds) > 1
    bands = means.set_index(["method", "server_round"])[["y_low", "y_high"]].set_axis(["low", "high"], axis=1)
    if not several:
        bands = _client_bands(tables, curve)
    if sum(index is not None for index in styles.values()) > BANDS:
        bands = bands.iloc[:0]
    views = {}
    for view, column, what, units in (
        ("by round", "", "round", None),
        ("by bytes sent", "sent", "sent until the end of the round, all clients, up and down", BYTES),
        ("by simulated time", "elapsed", "simulated time until the end of the round", SECONDS),
    ):
        size, unit = unit_of(means[column].to_numpy(), units) if units else (1.0, "")
        most_sent = means.groupby("method")["sent"].max()
        silent = list(most_sent.index[most_sent == 0]) if column == "sent" else []  # a vertical line at 0
        lines = []
        for method in tables.methods:
            mine = means[means["method"] == method].sort_values("server_round")
            if mine.empty or method in silent:
                continue
            mine = mine.iloc[thinned(len(mine), POINTS)]
            x = mine["server_round"].map(round_number) if not column else mine[column] / size
            band = bands.reindex([(method, number) for number in mine["server_round"]]) if len(bands) else bands
            has_band = len(bands) and styles.get(method) is not None and band["low"].notna().any()
            edges = [scale * array(band[name]) for name in ("low", "high")] if has_band else []
            lines.append(Line(method, styles.get(method), array(x), scale * array(mine["y"]), *edges))
        if not lines:
            continue
        largest = [line.x.max() for line in lines]
        log = column == "sent" and min(line.x.min() for line in lines) > 0 and max(largest) > 30 * min(largest)
        heights = np.concatenate([line.y for line in lines])
        flat = curve.key == "loss" and np.nanmin(heights) > 0 and np.nanmax(heights) > 100 * np.nanmin(heights)
        note = _note(tables, curve, several, any(len(line.low) for line in lines))
        if silent:
            note += f" Not shown, because nothing is sent: {', '.join(map(str, silent))}."
        views[view] = Figure(
            slug("curve", curve.key, view),
            f"{curve.title} {view}",
            Axis(f"{what}{f' ({unit})' if unit else ''}", log, whole=not column),
            Axis(curve.axis, log=bool(flat)),
            Lines(tuple(lines)),
            note,
        )
    return Card(curve.title, views)


def _client_bands(tables: RunTables, curve: Curve) -> pd.DataFrame:
    """Return the 10th and the 90th percentile over clients by method and round."""
    if not curve.moment or tables.quantiles.empty:
        return pd.DataFrame(columns=["low", "high"])
    rows = tables.quantiles[tables.quantiles["moment"] == curve.moment]
    return rows.drop_duplicates(["method", "server_round"]).set_index(["method", "server_round"])[["low", "high"]]


def _note(tables: RunTables, curve: Curve, several: bool, banded: bool) -> str:
    note = f"Mean over {len(tables.seeds)} seeds of the mean over clients" if several else "Mean over clients"
    if banded:
        note += "; band: lowest to highest seed" if several else "; band: 10th to 90th percentile of clients"
    last = round_number(tables.runs[0].config.rounds)
    return f"{note}. The last point, round {last}, is the final pass over all clients."
