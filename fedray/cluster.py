"""What a Ray cluster has and could get, and whether the client actors that an experiment asks for could ever start."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray._private.state

from fedray.errors import ConfigError
from fedray.packing import Amounts, fit_together, fits

MANY_NODES = 100
"""So many of a type where the autoscaler names no limit."""


def living() -> list[dict[str, Any]]:
    """Return what Ray knows of each living node."""
    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def living_nodes() -> list[dict[str, float]]:
    """Return what each living node has in all."""
    return [node["Resources"] for node in living()]


@dataclass(frozen=True)
class NodeType:
    """What the autoscaler can add. most: how many of them there may be."""

    name: str
    resources: Amounts
    most: int


def node_types() -> tuple[NodeType, ...]:
    """Return what the autoscaler can add; nothing where there is no autoscaler."""
    config = ray._private.state.state.get_cluster_config()
    groups = [] if config is None else config.node_group_configs
    return tuple(
        NodeType(group.name, dict(group.resources), MANY_NODES if group.max_count < 0 else group.max_count)
        for group in groups
        if group.max_count != 0
    )


def with_addable(nodes: Sequence[Amounts], types: Sequence[NodeType]) -> list[Amounts]:
    """Return the living nodes and those that the autoscaler may still add: of each type as many as are left of its
    most. A living node is of the type whose amounts it has."""
    left = {kind.name: kind.most for kind in types}
    for node in nodes:
        for kind in types:
            if left[kind.name] and all(node.get(name, 0) == kind.resources.get(name, 0) for name in ("CPU", "GPU")):
                left[kind.name] -= 1
                break
    return [*nodes, *(kind.resources for kind in types for _ in range(left[kind.name]))]


def check_room(
    asked: Mapping[str, Amounts], nodes: Sequence[Amounts], types: Sequence[NodeType], workers: Mapping[str, int]
) -> None:
    """Say at once what can never start.

    Raises:
        ConfigError: an actor that fits on no node, or tiers that do not fit together; the autoscaler's nodes count.
    """
    room = with_addable(nodes, types)
    for tier, amounts in asked.items():
        if not any(fits(amounts, node) for node in room):
            raise ConfigError(
                f"clients: an actor of tier {tier!r} fits on no node: it asks for {readable(amounts)}; the cluster's "
                f"nodes have {'; '.join(sorted({readable(node) for node in nodes}))}"
                + "".join(f"; node type {kind.name} has {readable(kind.resources)}" for kind in types)
            )
    if not fit_together(asked, room, workers):
        times = {tier: f"{number} workers of " if number > 1 else "" for tier, number in workers.items()}
        wanted = "; ".join(f"{tier}: {times[tier]}{readable(amounts)}" for tier, amounts in asked.items())
        could = f" and could get {readable(total_of(room))}" if types else ""
        raise ConfigError(
            f"clients.tiers: one actor of every tier ({wanted}) does not fit into the cluster at a time, which has "
            f"{readable(total_of(nodes))}{could}; lower num_cpus or num_gpus (they may be fractions)"
        )


def total_of(nodes: Sequence[Amounts]) -> Amounts:
    total: Counter[str] = Counter()
    for node in nodes:
        total.update(node)
    return total


def readable(amounts: Amounts) -> str:
    """Return `2 CPU, 0.5 GPU`; Ray's own bookkeeping resources are left out."""
    names = [name for name in ("CPU", "GPU", *sorted(amounts)) if amounts.get(name)]
    shown = {name: f"{amounts[name]:g} {name}" for name in names if ":" not in name and "store" not in name}
    if "memory" in shown:
        shown["memory"] = f"{amounts['memory'] / 1e9:.3g} GB memory"
    return ", ".join(shown.values()) or "nothing"
