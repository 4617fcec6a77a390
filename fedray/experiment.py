"""An experiment: each method of the comparison in turn, on identical data, partition, initial weights and cohorts."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from fedray.calibration import calibrated
from fedray.config import MethodConfig
from fedray.errors import ConfigError
from fedray.evaluation.metrics import default_metric, higher_is_better
from fedray.failures import Attempt
from fedray.federation import ClientsDone, Pool
from fedray.prepare import Prepared
from fedray.state import sha256
from fedray.tracking import Row, RunFolder, Summary, means, memory_row
from fedray.training.metering import MemoryUse
from fedray.training.threads import set_threads
from fedray.worker import Outcome

log = logging.getLogger(__name__)
TOTALS = ("uplink_bytes", "downlink_bytes", "late", "dropped_out", "left_out", "simulated_seconds")
"""Columns of a round that add up to the summary's."""


@dataclass(frozen=True)
class MethodStarted:
    method: str
    rounds: int
    turns: int
    """Clients' turns in all rounds and the final pass."""


@dataclass(frozen=True)
class TurnsFinished:
    method: str
    server_round: int
    clients: tuple[str, ...]


@dataclass(frozen=True)
class TurnFailed:
    method: str
    attempt: Attempt


@dataclass(frozen=True)
class RoundFinished:
    method: str
    server_round: int
    final: bool
    aggregated: float | None
    personalised: float | None
    train_loss: float | None
    seconds: float


@dataclass(frozen=True)
class MethodFinished:
    summary: Summary


Event = MethodStarted | TurnsFinished | TurnFailed | RoundFinished | MethodFinished


def run_experiment(prepared: Prepared, pool: Pool, path: Path) -> Iterator[Event]:
    """Run every method, write the run's folder as it goes, and yield what happens."""
    set_threads(prepared.config.clients.threads)
    prepared = calibrated(prepared, pool)
    folder = RunFolder(path, prepared.config)
    for entry in prepared.config.method:
        yield from _run_method(prepared, entry, pool, folder)


def _run_method(prepared: Prepared, entry: MethodConfig, pool: Pool, folder: RunFolder) -> Iterator[Event]:
    config, started = prepared.config, perf_counter()
    cohort = config.clients.per_round or len(prepared.clients)
    yield MethodStarted(entry.key, config.rounds, config.rounds * cohort + len(prepared.clients))
    folder.begin(entry.key)
    initial = pool.setup(prepared.jobs(entry, folder.path))
    federation = prepared.federation(entry, initial, pool)
    totals: Counter[str] = Counter()
    final: tuple[Outcome, ...] = ()
    for event in federation.run():
        if isinstance(event, ClientsDone):
            yield TurnsFinished(entry.key, event.server_round, event.clients)
            continue
        if isinstance(event, Attempt):
            folder.record_attempt(entry.key, event)
            yield TurnFailed(entry.key, event)
            continue
        row = folder.record(entry.key, event)
        if event.final:
            final = event.outcomes
        else:
            totals.update({name: row[name] for name in TOTALS})
        yield RoundFinished(
            entry.key,
            event.server_round,
            event.final,
            row["aggregated_mean"],
            row["personalised_mean"],
            row["train_loss"],
            event.seconds,
        )
    uses = pool.memory()
    metric = config.evaluation.metric or default_metric(config.task)
    measured = means(final)
    summary = Summary(
        method=entry.key,
        seed=config.seed,
        rounds=config.rounds,
        clients=len(prepared.clients),
        head=next(iter(prepared.costs[entry.key].values())).head,
        metric_name=metric,
        aggregated_mean=measured["aggregated_mean"],
        personalised_mean=measured["personalised_mean"],
        personalised_weighted_mean=measured["personalised_weighted_mean"],
        personalised_worst=measured["personalised_min" if higher_is_better(metric) else "personalised_max"],
        trainable_parameters=max(cost.trainable for cost in prepared.costs[entry.key].values()),
        **{name: totals[name] for name in TOTALS},
        wall_seconds=perf_counter() - started,
        state_sha256=sha256(folder.write_states(entry.key, federation.states())),
        data_sha256=prepared.data.fingerprint,
    )
    folder.finish(summary)
    folder.record_memory(_memory_rows(prepared, entry, uses))
    yield MethodFinished(summary)


def _memory_rows(prepared: Prepared, entry: MethodConfig, uses: Mapping[str, Sequence[MemoryUse]]) -> list[Row]:
    rows = []
    for tier, cost in prepared.costs[entry.key].items():
        try:
            footprint = prepared.footprint(entry, tier)
        except ConfigError as error:  # the run itself is fine
            log.warning("%s", error)
            footprint = None
        rows.append(memory_row(entry.key, tier, cost, footprint, uses.get(tier, ())))
    return rows
