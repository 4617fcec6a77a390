"""What a run leaves on disk, written after every round: a run that was ended keeps all rounds that it finished.

DIR/config.yaml         the resolved configuration
DIR/rounds.parquet      one row per method and round
DIR/clients.parquet     one row per method, round and client
DIR/events.parquet      one row per attempt that came to nothing, see `Attempt`; written when there is one
DIR/memory.parquet      one row per method and tier: predicted and measured peaks, see `memory_row`
DIR/summary.json        one entry per finished method
DIR/adapters/METHOD/    server.safetensors (the server's state), and per client clients/ID.safetensors (the trained
                        adapter that it took home) and states/ID.safetensors (its private state after the last round)
DIR/states/METHOD/      the clients' states while the method runs (`StateFiles`)
"""

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fedray.accounting import Cost
from fedray.config import ClientsConfig, Config, dump_yaml
from fedray.devices import device_seconds
from fedray.errors import ConfigError
from fedray.failures import Attempt
from fedray.federation import RoundDone
from fedray.memory import Footprint, Memory
from fedray.state import arrays, save_tensors
from fedray.training.metering import MemoryUse
from fedray.types import ClientId, Evaluation
from fedray.worker import Outcome

Row = dict[str, Any]


@dataclass(frozen=True)
class Summary:
    """One method's result. aggregated, personalised: metric on each client's test split in the final pass, right after
    aggregation and after the next local training; `weighted`: by test examples; `worst`: the client with the worst.
    uplink_bytes, downlink_bytes: over all rounds and clients, the final pass left out. late, dropped_out: clients that
    were asked and not aggregated, likewise; left_out: those that failed or sent what cannot be used.
    simulated_seconds: of all rounds on the tiers' devices. wall_seconds: on this machine, the final pass included.
    trainable_parameters: of a client; where tiers differ, the most. state_sha256: of the final server and client
    states. data_sha256: of the examples and who holds which."""

    method: str
    seed: int
    rounds: int
    clients: int
    head: str
    metric_name: str
    aggregated_mean: float | None
    personalised_mean: float | None
    personalised_weighted_mean: float | None
    personalised_worst: float | None
    trainable_parameters: int
    uplink_bytes: int
    downlink_bytes: int
    late: int
    dropped_out: int
    left_out: int
    simulated_seconds: float
    wall_seconds: float
    state_sha256: str
    data_sha256: str


class RunFolder:
    """The folder of one run.

    Raises:
        ConfigError: the folder exists and is not empty.
    """

    def __init__(self, path: Path, config: Config):
        self.path = path
        self._config = config
        self._rounds: list[pa.Table] = []
        self._clients: list[pa.Table] = []
        self._memory: list[pa.Table] = []
        self._events: list[pa.Table] = []
        self._summaries: list[Summary] = []
        check_free(path)
        path.mkdir(parents=True, exist_ok=True)
        self._write_text("config.yaml", dump_yaml(config))

    def begin(self, method: str) -> None:
        """Make the folder for the states of a method's clients while it runs."""
        (self.path / "states" / method).mkdir(parents=True)

    def record(self, method: str, done: RoundDone) -> Row:
        """Append a round (or the final pass) and its clients, and write both tables; return the round's row."""
        phase = "final" if done.final else "train"
        simulated = client_seconds(self._config.clients, done)
        row = {"method": method, "phase": phase, **round_row(done, simulated)}
        self._rounds.append(_table([row]))
        self._clients.append(
            _table(
                [
                    {"method": method, "phase": phase, **client_row(outcome, simulated[outcome.update.client.id])}
                    for outcome in done.outcomes
                ]
            )
        )
        self._write_table("rounds.parquet", self._rounds)
        self._write_table("clients.parquet", self._clients)
        return row

    def record_attempt(self, method: str, attempt: Attempt) -> None:
        """Append a row to the ledger, and write it."""
        row = {
            "time": datetime.now(UTC),
            "method": method,
            "server_round": attempt.server_round,
            "clients": list(attempt.clients),
            "attempt": attempt.number,
            "node": attempt.node,
            "kind": attempt.kind,
            "cause": attempt.cause,
            "action": attempt.action,
        }
        self._events.append(_table([row]))
        self._write_table("events.parquet", self._events)

    def record_memory(self, rows: Sequence[Row]) -> None:
        """Append a finished method's rows of memory.parquet, and write it."""
        self._memory.append(_table(rows))
        self._write_table("memory.parquet", self._memory)

    def write_states(self, method: str, states: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """Write a finished method's states, and yield them on, one in memory at a time."""
        for name, state in states:
            path = self.path / "adapters" / method / f"{name.replace('client/', 'states/')}.safetensors"
            save_tensors(path, arrays(state))
            yield name, state

    def finish(self, summary: Summary) -> None:
        """Write a finished method's entry of the summary. Its states are all written: the working files go."""
        shutil.rmtree(self.path / "states" / summary.method, ignore_errors=True)
        with suppress(OSError):  # another method's may still be there
            (self.path / "states").rmdir()
        self._summaries.append(summary)
        entries = [{name: _strict(value) for name, value in asdict(entry).items()} for entry in self._summaries]
        self._write_text("summary.json", json.dumps(entries, indent=2, allow_nan=False) + "\n")

    def _write_table(self, name: str, tables: list[pa.Table]) -> None:
        tables[:] = [pa.concat_tables(tables, promote_options="permissive")]
        temporary = self.path / f"{name}.tmp"
        pq.write_table(tables[0], temporary)
        os.replace(temporary, self.path / name)

    def _write_text(self, name: str, text: str) -> None:
        temporary = self.path / f"{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, self.path / name)


def _table(rows: Sequence[Row]) -> pa.Table:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return pa.table({column: [row.get(column) for row in rows] for column in columns})


def check_free(path: Path) -> None:
    """Raises:
    ConfigError: the folder exists and holds something: nothing that a user made is overwritten.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"output {path}: exists and is not empty; name another folder with --output")
    parent = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not os.access(parent, os.W_OK):
        raise ConfigError(f"output {path}: {parent} cannot be written to; name another folder with --output")


def client_seconds(clients: ClientsConfig, done: RoundDone) -> dict[ClientId, float]:
    """Return each client's simulated seconds: with the calibrated cost where there is one, else as measured here."""
    arrivals = {} if done.attendance is None else done.attendance.arrivals
    tiers = {name: clients.tier(name) for name in {outcome.update.client.tier for outcome in done.outcomes}}
    return {
        client.id: arrivals[client.id]
        if client.id in arrivals
        else device_seconds(tiers[client.tier], outcome.report.seconds, outcome.downlink_bytes, outcome.uplink_bytes)
        for outcome in done.outcomes
        for client in [outcome.update.client]
    }


def round_seconds(done: RoundDone, simulated: Mapping[ClientId, float]) -> float:
    """Return the round's simulated seconds: until the last update that was waited for."""
    if done.attendance is not None and done.attendance.seconds is not None:
        return done.attendance.seconds
    return max(simulated.values(), default=0.0)


def client_row(outcome: Outcome, simulated_seconds: float) -> Row:
    """Return a client's row of clients.parquet."""
    report, client = outcome.report, outcome.update.client
    return {
        "server_round": report.server_round,
        "client": client.id,
        "tier": client.tier,
        "num_examples": report.num_examples,
        "steps": report.steps,
        "seconds": report.seconds,
        "simulated_seconds": simulated_seconds,
        "train_loss": report.train_loss,
        **_evaluation("aggregated", report.aggregated),
        **_evaluation("personalised", report.personalised),
        "test_examples": report.personalised.num_examples if report.personalised else None,
        "uplink_bytes": outcome.uplink_bytes,
        "downlink_bytes": outcome.downlink_bytes,
        **report.recorded,
    }


def memory_row(method: str, tier: str, cost: Cost, footprint: Footprint | None, uses: Sequence[MemoryUse]) -> Row:
    """Return a row of memory.parquet, bytes of one actor of the tier: the parts of the prediction (`Memory`; null where
    none can be made), its sums, and what was measured, of the actor that took the most.

    predicted_device: weights to activations, all that a device of its own needs. predicted_host: what an actor holds of
    the host beyond host_baseline, its bare process; on a CPU that is everything, the node's shared file too.
    measured_device: null on a CPU. measured_host: PSS beyond host_baseline, in which a page that n processes share
    counts 1/n; without Ray all tiers are one process. trainable_share: 1 is full fine-tuning.
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
        "predicted_device": footprint.device.total if footprint else None,
        "predicted_host": footprint.host(on_gpu) if footprint else None,
        "measured_device": worst.device_peak if worst else None,
        "measured_host": worst.host_peak - worst.host_baseline if worst else None,
        "host_baseline": worst.host_baseline if worst else None,
    }


def round_row(done: RoundDone, simulated: Mapping[ClientId, float]) -> Row:
    """Return a round's row of rounds.parquet: means over its clients. simulated: each one's seconds."""
    losses = [outcome.report.train_loss for outcome in done.outcomes]
    return {
        "server_round": done.server_round,
        "clients": len(done.outcomes),
        "late": len(done.attendance.late) if done.attendance else 0,
        "dropped_out": len(done.attendance.dropped_out) if done.attendance else 0,
        "left_out": len(done.left_out),
        "simulated_seconds": round_seconds(done, simulated),
        "train_loss": float(np.mean(losses)) if losses else None,
        **means(done.outcomes),
        "uplink_bytes": sum(outcome.uplink_bytes for outcome in done.outcomes),
        "downlink_bytes": sum(outcome.downlink_bytes for outcome in done.outcomes),
        "seconds": done.seconds,
        **done.metrics,
    }


def means(outcomes: Sequence[Outcome]) -> dict[str, float | None]:
    """Return the metric's means over the clients that were measured and have test examples; None if there are none."""
    before = [entry for outcome in outcomes if (entry := outcome.report.aggregated) and entry.num_examples]
    after = [entry for outcome in outcomes if (entry := outcome.report.personalised) and entry.num_examples]
    return {
        "aggregated_mean": _mean([entry.metric for entry in before]),
        "personalised_mean": _mean([entry.metric for entry in after]),
        "personalised_weighted_mean": _mean([entry.metric for entry in after], [entry.num_examples for entry in after]),
        "personalised_min": min((entry.metric for entry in after), default=None),
        "personalised_max": max((entry.metric for entry in after), default=None),
    }


def _evaluation(moment: str, evaluation: Evaluation | None) -> Row:
    return {
        f"{moment}_loss": evaluation.loss if evaluation else None,
        f"{moment}_metric": evaluation.metric if evaluation else None,
    }


def _strict(value: Any) -> Any:
    """JSON has no NaN and no infinity: an undefined score is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _mean(values: Sequence[float], weights: Sequence[float] | None = None) -> float | None:
    return float(np.average(values, weights=weights)) if values else None
