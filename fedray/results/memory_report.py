"""Memory tables: predictions, what fits on a cluster, and what a run measured."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from fedray.config import Memory
from fedray.planning.cluster_plan import Plan, Room
from fedray.results.report import plain_table, readable_bytes, times, trains_all

PARTS = ("weights", "adapter", "gradients", "optimizer", "activations")
"""Columns of the predicted memory of a device."""


def plan_table(made: Sequence[Plan]) -> Table:
    """Return a table of each method's bytes per tier.

    If a method of the comparison trains the whole model, two columns say how many times more device memory it needs: in
    total, and without activations, which are similar for all methods.
    """
    full = {plan.tier: plan.footprint.device for plan in made if trains_all(plan.cost)}
    ratio = ["full /\ndevice", "without\nactiv."] if full else []
    once = ["held once\nper GPU"] if any(plan.held_once for plan in made) else []
    numbers = (*PARTS, "device", *ratio, "offloaded", "host per\nactor", "host\nshared", *once, "of a\nGPU")
    table = plain_table("memory of one client actor at its peak", ("method", "tier"), numbers)
    for plan in made:
        device = plan.footprint.device
        whole = full.get(plan.tier, Memory())
        table.add_row(
            plan.method,
            plan.tier,
            *(readable_bytes(getattr(device, part)) for part in PARTS),
            readable_bytes(device.total),
            *([times(whole.total, device.total), times(whole.resting, device.resting)] if full else []),
            readable_bytes(plan.footprint.offloaded.total),
            readable_bytes(plan.host),
            readable_bytes(0 if plan.on_gpu else plan.footprint.shared),
            *(readable_bytes(plan.held_once) for _ in once),
            f"{plan.gpu:.4f}" if plan.on_gpu else "-",
        )
    return table


def room_table(found: Sequence[Room]) -> Table:
    """Return a table of what an actor of each tier needs for its largest method, and how many actors the cluster
    holds."""
    numbers = ("CPU", "GPU", "host memory", "actors, this\ntier alone", "actors, all\ntiers together")
    table = plain_table("what fits the cluster", ("tier",), numbers)
    for room in found:
        table.add_row(
            room.tier,
            f"{room.request['CPU']:g}",
            f"{room.request['GPU']:g}",
            readable_bytes(room.request["memory"]),
            f"{room.alone:,}",
            f"{room.together:,}",
        )
    return table


def measured_table(rows: Sequence[Mapping[Any, Any]]) -> Table:
    """Return a table of a run's predicted and measured peaks: of the GPU or, on a CPU, of the process beyond its memory
    before the model was loaded.

    Args:
        rows: rows of memory.parquet.
    """
    shown = [(row, *_peaks(row)) for row in rows]
    full = {row["tier"]: (predicted, measured) for row, predicted, measured in shown if row["trainable_share"] == 1}
    ratios = ["full /\npredicted", "full /\nmeasured"] if full else []
    table = plain_table("peak memory of a client actor", ("method", "tier", "on"), ("predicted", "measured", *ratios))
    for row, predicted, measured in shown:
        whole = full.get(row["tier"], (None, None))
        table.add_row(
            row["method"],
            row["tier"],
            row["device"],
            *("-" if value is None else readable_bytes(value) for value in (predicted, measured)),
            *([times(whole[0], predicted), times(whole[1], measured)] if full else []),
        )
    return table


def _peaks(row: Mapping[Any, Any]) -> tuple[float | None, float | None]:
    place = "device" if row["device"] == "cuda" else "host"
    return row[f"predicted_{place}"], row[f"measured_{place}"]
