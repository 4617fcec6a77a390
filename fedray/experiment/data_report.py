"""The report of an experiment before it runs: which client holds what, and what each method will cost."""

import numpy as np
import pandas as pd

from fedray.config import dump_yaml
from fedray.errors import ConfigError
from fedray.experiment.prepare import Prepared
from fedray.experiment.rows import partition_rows
from fedray.report.build import facts
from fedray.report.document import Report, Section, Text
from fedray.report.figure import BYTES, COUNTS, Axis, Bars, Card, Figure, array, unit_of
from fedray.report.partition import partition_cards
from fedray.results.versions import installed_versions


def data_report(prepared: Prepared) -> Report:
    """Return the report of a checked experiment: its partition, costs, and predicted memory."""
    config = prepared.config
    cards, notes = partition_cards(pd.DataFrame(partition_rows(prepared.clients, prepared.data)))
    data = Section("data", "Data of the clients", tuple(cards), notes=(*notes, *prepared.data.notes))
    memory, no_memory = _memory(prepared)
    costs = Section("costs", "Costs", (_trainable(prepared), _traffic(prepared), *memory), notes=no_memory)
    versions = "\n".join(f"{name}=={version}" for name, version in installed_versions().items())
    texts = (Text("Configuration", dump_yaml(config), folded=True), Text("Versions", versions, folded=True))
    repeat = Section("repeat", "Configuration and versions", texts=texts)
    methods = [entry.key for entry in config.method]
    return Report(
        f"{config.name}: before training",
        facts(config, len(prepared.clients), methods, [config.seed]),
        (data, costs, repeat),
    )


def _rows(prepared: Prepared) -> list[tuple[str, str, str]]:
    """Return the rows of the figures: their names, the methods and the tiers; tiers that do not differ share one."""
    rows = []
    for method, by_tier in prepared.costs.items():
        alike = len(set(by_tier.values())) == 1
        tiers = list(by_tier)[:1] if alike else list(by_tier)
        rows += [(method if alike else f"{method}, {tier}", method, tier) for tier in tiers]
    return rows


def _trainable(prepared: Prepared) -> Card:
    rows = _rows(prepared)
    values = array([prepared.costs[method][tier].trainable for _, method, tier in rows])
    size, unit = unit_of(values, COUNTS)
    return Card.of(
        Figure(
            "trainable",
            "Trainable parameters of a client",
            Axis(f"trainable parameters{f' ({unit})' if unit else ''}"),
            Axis("method"),
            Bars(tuple(name for name, _, _ in rows), {"trainable": values / size}),
        )
    )


def _traffic(prepared: Prepared) -> Card:
    rows = _rows(prepared)
    parts = {
        "up, from the client": array([prepared.costs[method][tier].uplink_bytes for _, method, tier in rows]),
        "down, to the client": array([prepared.costs[method][tier].downlink_bytes for _, method, tier in rows]),
    }
    size, unit = unit_of(np.sum(list(parts.values()), axis=0), BYTES)
    return Card.of(
        Figure(
            "traffic-per-client",
            "Traffic of a client in a round, by direction",
            Axis(f"sent per client and round ({unit})"),
            Axis("method"),
            Bars(tuple(name for name, _, _ in rows), {part: values / size for part, values in parts.items()}),
            "As of the second round; the first one may differ.",
        )
    )


def _memory(prepared: Prepared) -> tuple[tuple[Card, ...], tuple[str, ...]]:
    """Return the predicted memory by its parts, or why there is no prediction."""
    names, parts = [], []
    try:
        for entry in prepared.config.method:
            for tier in prepared.costs[entry.key]:
                names.append(f"{entry.key}, {tier}" if len(prepared.costs[entry.key]) > 1 else entry.key)
                parts.append(vars(prepared.footprint(entry, tier).device))
    except ConfigError as error:
        return (), (f"Memory cannot be predicted: {error}",)
    table = pd.DataFrame(parts)
    size, unit = unit_of(table.sum(axis=1).to_numpy(float), BYTES)
    figure = Figure(
        "memory",
        "Predicted memory of a client actor's device",
        Axis(f"peak memory ({unit})"),
        Axis("method"),
        Bars(tuple(names), {str(part): array(table[part]) / size for part in table}),
        "docs/memory.md explains the parts. On a CPU, the weights are shared by the actors of a node.",
    )
    return (Card.of(figure),), ()
