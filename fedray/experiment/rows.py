"""The rows of a run's tables: one per round, client, and method on a tier."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, get_args

import numpy as np

from fedray.config import ClientsConfig, Memory
from fedray.data.shards import FederatedData
from fedray.federation.participation import device_seconds
from fedray.federation.rounds import RoundResult
from fedray.federation.tasks import ClientResult
from fedray.planning.accounting import Cost
from fedray.planning.memory import Footprint
from fedray.training.metering import MemoryUse
from fedray.training.trainer import ClientReport
from fedray.types import COMMON, SPLITS, Client, ClientId, Moment

Row = dict[str, Any]


def client_seconds(clients: ClientsConfig, done: RoundResult) -> dict[ClientId, float]:
    """Return each client's simulated seconds: by the calibrated cost if there is one, otherwise from the training time
    measured on this machine."""
    arrivals = {} if done.participation is None else done.participation.arrivals
    tiers = {name: clients.tier(name) for name in {result.client.tier for result in done.results}}
    return {
        result.client.id: arrivals[result.client.id]
        if result.client.id in arrivals
        else device_seconds(
            tiers[result.client.tier], result.report.seconds, result.downlink_bytes, result.uplink_bytes
        )
        for result in done.results
    }


def round_seconds(done: RoundResult, simulated: Mapping[ClientId, float]) -> float:
    """Return the round's simulated seconds, until the last update that the server waited for."""
    if done.participation is not None and done.participation.seconds is not None:
        return done.participation.seconds
    return max(simulated.values(), default=0.0)


def client_row(result: ClientResult, simulated_seconds: float) -> Row:
    """Return a client's row of clients.parquet."""
    report, client = result.report, result.client
    before, after = report.evaluation("aggregated"), report.evaluation("personalised")
    tested = after or before
    return {
        "server_round": result.server_round,
        "client": client.id,
        "tier": client.tier,
        "num_examples": result.num_examples,
        "steps": report.steps,
        "seconds": report.seconds,
        "simulated_seconds": simulated_seconds,
        "train_loss": report.train_loss,
        "aggregated_loss": before.loss if before else None,
        "aggregated_metric": before.metric if before else None,
        "personalised_loss": after.loss if after else None,
        "personalised_metric": after.metric if after else None,
        "test_examples": tested.num_examples if tested else None,
        "uplink_bytes": result.uplink_bytes,
        "downlink_bytes": result.downlink_bytes,
        **report.recorded,
    }


def partition_rows(clients: Sequence[Client], data: FederatedData) -> list[Row]:
    """Return the rows of partition.parquet: how many examples a client has, per split, and per kind and name of what is
    counted: `all` examples, without a name; of a `class`; of a `task`, where the data has several. Counts of 0 are left
    out, apart from those of all examples."""
    rows: list[Row] = []
    for client in clients:
        shard = data.shards[client.id]
        for split in SPLITS:
            at = {"client": client.id, "tier": client.tier, "split": split}
            rows.append({**at, "kind": "all", "name": "", "examples": shard.num_examples(split)})
            found = {"task": data.client_parts.get(client.id, {}).get(split, {})}
            if data.label_names:
                labels = shard.tables[split]["labels"].to_numpy()
                counts = np.bincount(labels, minlength=len(data.label_names)).tolist()
                found["class"] = dict(zip(data.label_names, counts, strict=True))
            rows += [
                {**at, "kind": kind, "name": name, "examples": count}
                for kind, counted in found.items()
                for name, count in counted.items()
                if count
            ]
    return rows


def memory_row(method: str, tier: str, cost: Cost, footprint: Footprint | None, uses: Sequence[MemoryUse]) -> Row:
    """Return a row of memory.parquet: bytes of one actor of the tier.

    The row has the parts of the prediction (`Memory`; null if none can be made), its sums, and what was measured in the
    actor with the highest peak. Some columns need an explanation:

    - `trainable_share`: 1 is full fine-tuning.
    - `predicted_device`: weights to activations, everything that a device of its own needs; without weights that
      another process holds for all actors of a GPU (`shared`).
    - `predicted_host`: host memory of an actor beyond `host_baseline`, its bare process. On a CPU this is everything,
      including the weights that the node's actors share.
    - `measured_device`: null on a CPU.
    - `measured_host`: anonymous memory beyond the bare process's, and the base model's weights that were read, in full.
      Without Ray, all tiers are one process.
    - `host_baseline`: PSS of the bare process; a page that n processes share counts 1/n.
    """
    on_gpu = any(use.device == "cuda" for use in uses)
    parts = dict.fromkeys(field.name for field in fields(Memory)) if footprint is None else asdict(footprint.device)
    worst = max(uses, key=lambda use: (use.device_peak or 0, use.host_peak), default=None)
    return {
        "method": method,
        "tier": tier,
        "device": "cuda" if on_gpu else "cpu",
        "trainable_share": cost.trainable / cost.total,
        **parts,
        "offloaded": footprint.offloaded.total if footprint else None,
        "vectors": footprint.vectors if footprint else None,
        "shared": footprint.shared if footprint else None,
        "predicted_device": footprint.device.total - (worst.held_elsewhere if worst else 0) if footprint else None,
        "predicted_host": footprint.host(on_gpu) if footprint else None,
        "measured_device": worst.device_peak if worst else None,
        "measured_host": worst.host_peak if worst else None,
        "host_baseline": worst.host_baseline if worst else None,
    }


def round_row(done: RoundResult, simulated: Mapping[ClientId, float]) -> Row:
    """Return a round's row of rounds.parquet, with means over its clients.

    Args:
        simulated: each client's simulated seconds.
    """
    losses = [result.report.train_loss for result in done.results if result.report.steps]
    return {
        "server_round": done.server_round,
        "clients": len(done.results),
        "late": len(done.participation.stragglers) if done.participation else 0,
        "dropped_out": len(done.participation.dropped_out) if done.participation else 0,
        "left_out": len(done.left_out),
        "simulated_seconds": round_seconds(done, simulated),
        "train_loss": float(np.mean(losses)) if losses else None,
        **means(done.results),
        "uplink_bytes": sum(result.uplink_bytes for result in done.results),
        "downlink_bytes": sum(result.downlink_bytes for result in done.results),
        "seconds": done.seconds,
        **done.metrics,
    }


def means(results: Sequence[ClientResult]) -> dict[str, float | None]:
    """Return the first metric's means and extremes over the measured clients that have test examples, and over those
    that have validation examples (`validation_...`); None if there are none. With a common test set, also the means
    on that (`common_...`), and the metric of the server's model on it (`common_server`)."""
    reports = [result.report for result in results if result.report.evaluations]
    found = _means(reports, "test") | {f"validation_{name}": v for name, v in _means(reports, "validation").items()}
    if not any(COMMON in by_examples for report in reports for by_examples in report.evaluations.values()):
        return found
    server = [one.metric for report in reports if (one := report.evaluation("server", COMMON))]
    on_common = {f"common_{name}": value for name, value in _means(reports, COMMON).items()}
    return found | on_common | {"common_server": _mean(server)}


def _means(reports: Sequence[ClientReport], examples: str) -> dict[str, float | None]:
    before, after = (
        [found for report in reports if (found := report.evaluation(moment, examples)) and found.num_examples]
        for moment in get_args(Moment)
    )
    return {
        "aggregated_mean": _mean([entry.metric for entry in before]),
        "personalised_mean": _mean([entry.metric for entry in after]),
        "personalised_weighted_mean": _mean([entry.metric for entry in after], [entry.num_examples for entry in after]),
        "personalised_min": min((entry.metric for entry in after), default=None),
        "personalised_max": max((entry.metric for entry in after), default=None),
    }


def evaluation_rows(result: ClientResult) -> list[Row]:
    """Return a client's rows of evaluations.parquet: one per moment, examples, group of examples, and metric. The group
    of all examples is empty, and the server's model has no client."""
    return [
        {
            "server_round": result.server_round,
            "client": None if moment == "server" else result.client.id,
            "moment": moment,
            "examples": examples,
            "group": group,
            "metric": label,
            "value": value,
            "loss": found.loss,
            "num_examples": found.num_examples,
        }
        for moment, by_examples in result.report.evaluations.items()
        for examples, whole in by_examples.items()
        if whole.num_examples
        for group, found in {"": whole, **whole.groups}.items()
        for label, value in found.metrics.items()
    ]


def example_rows(result: ClientResult) -> list[Row]:
    """Return a client's rows of examples.parquet: one per moment and example, which is a number within the client's
    examples (or within the common test set), the same for all methods."""
    rows = []
    for moment, by_examples in result.report.evaluations.items():
        client = None if moment == "server" else result.client.id
        for examples, found in by_examples.items():
            at = {"client": client, "moment": moment, "examples": examples}
            names = tuple(found.examples)
            for number, values in enumerate(zip(*found.examples.values(), strict=True)):
                rows.append({**at, "example": number, **dict(zip(names, values, strict=True))})
    return rows


def strict(value: Any) -> Any:
    """Return a value as JSON can hold it: JSON has neither NaN nor infinity, so an undefined score is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _mean(values: Sequence[float], weights: Sequence[float] | None = None) -> float | None:
    return float(np.average(values, weights=weights)) if values else None
