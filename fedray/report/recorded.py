"""Figures of what methods recorded: λ, the weights of mixers, memberships in clusters, and anything else.

A method records numbers and lists of numbers per client (`Local.record`), and its server reports numbers per round.
Every name has a figure; those of built-in methods have titles of their own.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from fedray.report.curves import POINTS
from fedray.report.figure import Axis, Card, Figure, Heat, Line, Lines, array, slug, thinned
from fedray.report.scores import Styles
from fedray.report.tables import RunTables
from fedray.types import round_number

TITLES: Mapping[str, tuple[str, str]] = {
    "lam": ("λ of FedReFT", "λ: weight of the other clients' interventions (0 to 1)"),
    "mixer_mean": ("Mixer weights of FedALT", "weight of a client's own LoRA, mean over tokens and layers (0 to 1)"),
    "clusters": ("Memberships in clusters", "mean membership of the clients (0 to 1)"),
    "cluster": ("Clusters of the clients", "index of the cluster"),
    "mask_size": ("Rows that a client trains", "rows in a client's mask"),
    "active_rank": ("Ranks that a client trains", "rank of a client's LoRA"),
}
"""Title and axis by the name under which a method records."""


def recorded_cards(tables: RunTables, styles: Styles) -> list[Card]:
    """Return a card for everything that methods recorded or reported."""
    cards = [_number_card(rows, str(name), styles) for name, rows in _by_name(tables.recorded) if name != "cluster"]
    cards += [_list_card(tables, rows, str(name)) for name, rows in _by_name(tables.components)]
    if not tables.choices.empty:
        alone = tables.choices[tables.choices["name"] == "cluster"]
        cards += [Card.of(_choice_figure(rows, "cluster", str(method))) for method, rows in alone.groupby("method")]
    return cards + _server_cards(tables)


def _by_name(frame: pd.DataFrame) -> list[tuple[object, pd.DataFrame]]:
    return [] if frame.empty else list(frame.groupby("name", sort=False))


def _number_card(rows: pd.DataFrame, name: str, styles: Styles) -> Card:
    """Return the quantiles over clients of a recorded number by round."""
    title, axis = TITLES.get(name, (name, name))
    lines = []
    for method, mine in rows.groupby("method", sort=False):
        mine = mine.groupby("server_round")[["low", "median", "high"]].mean()
        mine = mine.iloc[thinned(len(mine), POINTS)]
        style = styles.get(str(method))
        edges = [array(mine[column]) for column in ("low", "high")] if style is not None else []
        lines.append(Line(str(method), style, _rounds(mine.index), array(mine["median"]), *edges))
    note = "Median over clients; band: 10th to 90th percentile."
    figure = Figure(slug("recorded", name), title, Axis("round", whole=True), Axis(axis), Lines(tuple(lines)), note)
    return Card.of(figure)


def _list_card(tables: RunTables, rows: pd.DataFrame, name: str) -> Card:
    """Return the means over clients of a list's components by round, and each client's largest component, a view per
    method."""
    title, axis = TITLES.get(name, (name, name))
    views = {}
    for method, mine in rows.groupby("method", sort=False):
        lines = []
        for component in sorted(map(int, mine["component"].unique())):
            label = f"cluster {component}" if name == "clusters" else f"{name} {component}"
            lines.append(Line(label, component, *_by_round(mine[mine["component"] == component], "mean")))
        views[f"{method}: mean"] = Figure(
            slug("recorded", name, str(method)),
            f"{title}: {method}",
            Axis("round", whole=True),
            Axis(axis),
            Lines(tuple(lines)),
            "Mean over the clients that took part in the round.",
        )
        if not tables.choices.empty:
            chosen = tables.choices[(tables.choices["name"] == name) & (tables.choices["method"] == method)]
            if not chosen.empty:
                views[f"{method}: clients"] = _choice_figure(chosen, name, str(method))
    return Card(title, views)


def _choice_figure(rows: pd.DataFrame, name: str, method: str) -> Figure:
    """Return which cluster a client belongs to, by round."""
    table = rows.pivot_table(index="client", columns="server_round", values="choice", aggfunc="first")
    columns = table.columns[thinned(len(table.columns), POINTS)]
    values = table[columns].to_numpy(float)
    last = pd.DataFrame(values).ffill(axis=1).iloc[:, -1].to_numpy()
    order = np.argsort(last, kind="stable")
    number = int(np.nanmax(values)) + 1
    return Figure(
        slug("recorded", name, method, "clients"),
        f"Cluster of every client: {method}",
        Axis("round", whole=True),
        Axis("client"),
        Heat(
            tuple(str(table.index[i]) for i in order),
            tuple(str(round_number(int(column))) for column in columns),
            values[order],
            "cluster",
            tuple(f"cluster {index}" for index in range(number)),
        ),
        "The cluster to which a client belongs most. Where nothing is drawn, a client did not take part. Clients are "
        "ordered by their last cluster.",
    )


def _server_cards(tables: RunTables) -> list[Card]:
    """Return what servers reported; the sizes of clusters are one figure."""
    server = tables.server
    if server.empty:
        return []
    sizes = server["name"].str.fullmatch(r"cluster_\d+_size")
    cards = []
    for method, rows in server[sizes].groupby("method", sort=False):
        names = sorted(set(rows["name"]), key=lambda name: int(name.split("_")[1]))
        lines = [
            Line(f"cluster {index}", index, *_by_round(rows[rows["name"] == name])) for index, name in enumerate(names)
        ]
        figure = Figure(
            slug("cluster-sizes", str(method)),
            f"Sizes of the clusters: {method}",
            Axis("round", whole=True),
            Axis("clients (memberships summed)"),
            Lines(tuple(lines)),
        )
        cards.append(Card.of(figure))
    for name, rows in server[~sizes].groupby("name", sort=False):
        lines = [
            Line(str(method), index, *_by_round(mine))
            for index, (method, mine) in enumerate(rows.groupby("method", sort=False))
        ]
        figure = Figure(
            slug("server", str(name)),
            f"Reported by the server: {name}",
            Axis("round", whole=True),
            Axis(str(name)),
            Lines(tuple(lines)),
        )
        cards.append(Card.of(figure))
    return cards


def _by_round(rows: pd.DataFrame, column: str = "value") -> tuple[np.ndarray, np.ndarray]:
    """Return the rounds, and the mean of a column in each."""
    values = rows.groupby("server_round")[column].mean()
    values = values.iloc[thinned(len(values), POINTS)]
    return _rounds(values.index), array(values)


def _rounds(indices: pd.Index) -> np.ndarray:
    return array([round_number(int(number)) for number in indices])
