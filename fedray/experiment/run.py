"""An experiment: each method of the comparison in turn, on identical data, partition, initial weights and cohorts."""

import logging
import math
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from time import perf_counter
from typing import Any

from fedray.config import MethodConfig, Metric
from fedray.errors import ConfigError
from fedray.evaluation.metrics import configured_metric
from fedray.experiment.calibration import calibrated
from fedray.experiment.prepare import Prepared
from fedray.experiment.rows import Row, means, memory_row, partition_rows
from fedray.experiment.run_folder import RunFolder
from fedray.federation.events import Event, MethodFinished, MethodStarted, RoundFinished, RunStarted, TaskFailed
from fedray.federation.rounds import Federation, Pool, Round, RoundResult
from fedray.federation.summary import Summary
from fedray.methods.registry import build_method
from fedray.storage.checkpoints import Checkpoints, Progress
from fedray.storage.client_states import StateRef
from fedray.storage.paths import StoragePath
from fedray.storage.state_tree import sha256
from fedray.training.metering import MemoryUse
from fedray.training.threads import set_threads
from fedray.types import ClientId

log = logging.getLogger(__name__)
Reached = tuple[int, Any, dict[ClientId, StateRef]]
"""A federation's round, server's state and clients' states."""
TOTALS = ("uplink_bytes", "downlink_bytes", "late", "dropped_out", "left_out", "simulated_seconds")
"""Columns of a round whose sums over rounds are in the summary."""


def run_experiment(
    prepared: Prepared, pool: Pool, where: str | Path | StoragePath, resume: bool = False, overlap: bool = False
) -> Iterator[Event]:
    """Run every method, write the run's folder after each round, and yield what happens.

    Args:
        where: the run's folder.
        resume: continue the run that is in the folder (`resume.continued`).
        overlap: write a round, and yield its end, while the first tasks of the next one run; not for callers that may
            end the run after any round.
    """
    set_threads(prepared.config.clients.threads or 1)
    prepared = calibrated(prepared, pool)
    with closing(RunFolder(StoragePath.of(where), prepared.config, resume)) as folder:
        yield RunStarted(folder.place, prepared.config)
        folder.record_data(lambda: partition_rows(prepared.clients, prepared.data))
        for entry in prepared.config.method:
            if (summary := folder.finished(entry.key)) is not None:
                yield MethodFinished(summary)
            else:
                yield from _run_method(prepared, entry, pool, folder, overlap)


def _run_method(
    prepared: Prepared, entry: MethodConfig, pool: Pool, folder: RunFolder, overlap: bool
) -> Iterator[Event]:
    config, started = prepared.config, perf_counter()
    build_method(config, entry)  # a new process: importing the method registers the states that a checkpoint contains
    metric = configured_metric(config)
    checkpoints = Checkpoints(folder.place, entry.key, config.checkpoint, metric.higher_is_better)
    before = _restored(prepared, entry, checkpoints, folder)
    done = before.server_round if before else 0
    cohort = config.clients.per_round or len(prepared.clients)
    yield MethodStarted(entry.key, config.rounds, config.rounds * cohort + len(prepared.clients), done, done * cohort)
    federation = prepared.federation(entry, pool.setup(prepared.worker_setups(entry, folder.place)), pool)
    if before is not None:
        federation.restore(before.server_round, before.server, before.client_states)
    record = _Record(prepared, entry, pool, folder, checkpoints, before, started)
    if before is None and config.checkpoint.every:  # from now on there is always a checkpoint
        record.checkpoint(_reached(federation), None)
    unrecorded: Iterator[Event] = iter(())
    while federation.server_round < config.rounds:
        result = yield from _logged(federation.round(), folder, unrecorded)
        unrecorded = record.round(result, _reached(federation))
        if not overlap or federation.server_round == config.rounds:
            yield from unrecorded
    final = yield from _logged(federation.final_pass(), folder, unrecorded)
    yield _round_finished(entry, final, folder.record(entry.key, final))
    uses = pool.memory()
    summary = Summary(
        method=entry.key,
        seed=config.seed,
        rounds=config.rounds,
        clients=len(prepared.clients),
        head=next(iter(prepared.costs[entry.key].values())).head,
        metric_name=metric.label,
        **_scores(means(final.results), metric),
        trainable_parameters=max(cost.trainable for cost in prepared.costs[entry.key].values()),
        **{name: record.totals[name] for name in TOTALS},
        wall_seconds=record.seconds,
        state_sha256=sha256(folder.write_states(entry.key, federation.states())),
        data_sha256=prepared.data.fingerprint,
    )
    folder.record_memory(_memory_rows(prepared, entry, uses))
    folder.finish(summary)
    pool.forget(checkpoints.finish())
    yield MethodFinished(summary)


class _Record:
    """What a method's rounds leave: rows, sums over rounds, and checkpoints.

    Args:
        before: the checkpoint that the method continues from.
        started: when it began or was continued.

    Attributes:
        totals: sums over the recorded rounds.
    """

    def __init__(
        self,
        prepared: Prepared,
        entry: MethodConfig,
        pool: Pool,
        folder: RunFolder,
        checkpoints: Checkpoints,
        before: Progress | None,
        started: float,
    ):
        self.totals = Counter(before.totals if before else {})
        self._config, self._data_sha256, self._entry = prepared.config, prepared.data.fingerprint, entry
        self._pool, self._folder, self._checkpoints = pool, folder, checkpoints
        self._started = started - (before.seconds if before else 0.0)
        self._replaced: list[StateRef] = []

    @property
    def seconds(self) -> float:
        """Seconds that the method has taken, before an interruption and since."""
        return perf_counter() - self._started

    def round(self, result: RoundResult, where: Reached) -> Iterator[Event]:
        """Write a round, and a checkpoint if one is due.

        Args:
            where: what the federation had reached when the round ended; it may have gone on since.
        """
        row = self._folder.record(self._entry.key, result)
        self.totals.update({name: row[name] for name in TOTALS})
        self._replaced += result.replaced
        if self._checkpoints.due(result.server_round + 1, self._config.rounds):
            self._forget(self.checkpoint(where, _score(row)))
        elif not self._config.checkpoint.every:
            self._forget(self._replaced)
        yield _round_finished(self._entry, result, row)

    def checkpoint(self, where: Reached, score: float | None) -> Sequence[StateRef]:
        """Write a checkpoint; return the states that none references any more."""
        progress = Progress(*where, self.totals, self.seconds, score, self._data_sha256)
        return self._checkpoints.save(progress, self._replaced)

    def _forget(self, refs: Sequence[StateRef]) -> None:
        self._pool.forget(refs)
        self._replaced = []


def _reached(federation: Federation) -> Reached:
    return federation.server_round, federation.server, dict(federation.client_states)


def _restored(prepared: Prepared, entry: MethodConfig, checkpoints: Checkpoints, folder: RunFolder) -> Progress | None:
    """Prepare the folder for a method's rounds; return the progress to continue from, or None if the method begins.

    Raises:
        ConfigError: the data differ from those of the interrupted run.
        StateError: the method has rounds, but no intact checkpoint.
    """
    before, broken = checkpoints.newest() if folder.resumed else (None, [])
    if before is not None and before.data_sha256 != prepared.data.fingerprint:
        raise ConfigError(
            f"{folder.place}: the data have changed since the run began: the examples or their assignment to clients "
            f"differ (data_sha256 {before.data_sha256[:12]}, now {prepared.data.fingerprint[:12]})"
        )
    folder.begin(entry.key, before.server_round if before else None)
    if before is not None:
        for cause in broken:
            log.warning("%s: an older checkpoint is used: %s", entry.key, cause)
        folder.record_continued(entry.key, before.server_round, broken)
    return before


def _logged(round: Round, folder: RunFolder, meanwhile: Iterator[Event]) -> Generator[Event, None, RoundResult]:
    """Run a round, and write its failed attempts to the run's event log.

    Args:
        meanwhile: other work, which is done while the round's first tasks run; at the latest when the round ends or
            fails.
    """
    try:
        while True:
            event = next(round)
            if event is None:
                yield from meanwhile
                continue
            if isinstance(event, TaskFailed):
                folder.record_attempt(event.method, event.attempt)
            yield event
    except StopIteration as end:
        result: RoundResult = end.value
        yield from meanwhile
        return result
    except GeneratorExit:
        raise
    except BaseException:
        yield from meanwhile
        raise


def _round_finished(entry: MethodConfig, result: RoundResult, row: Row) -> RoundFinished:
    return RoundFinished(
        entry.key,
        result.server_round,
        result.final,
        row["aggregated_mean"],
        row["personalised_mean"],
        row["train_loss"],
        row["uplink_bytes"],
        row["downlink_bytes"],
        result.seconds,
        result.metrics,
        validation_aggregated=row["validation_aggregated_mean"],
        validation_personalised=row["validation_personalised_mean"],
        simulated_seconds=row["simulated_seconds"],
    )


def _score(row: Row) -> float | None:
    """Return the score by which the best checkpoint is chosen; None if it is undefined."""
    score: float | None = row["validation_personalised_mean"]
    return score if score is not None and math.isfinite(score) else None


def _scores(measured: Mapping[str, float | None], metric: Metric) -> dict[str, Any]:
    """Return the scores of a summary from the means of the final pass."""
    worst = "personalised_min" if metric.higher_is_better else "personalised_max"
    names = {name: name for name in ("aggregated_mean", "personalised_mean", "personalised_weighted_mean")}
    return {
        f"{of}{name}": measured[f"{of}{source}"]
        for of in ("", "validation_")
        for name, source in (names | {"personalised_worst": worst}).items()
    }


def _memory_rows(prepared: Prepared, entry: MethodConfig, uses: Mapping[str, Sequence[MemoryUse]]) -> list[Row]:
    rows = []
    for tier, cost in prepared.costs[entry.key].items():
        try:
            footprint = prepared.footprint(entry, tier)
        except ConfigError as error:  # a missing prediction must not end the run
            log.warning("%s", error)
            footprint = None
        rows.append(memory_row(entry.key, tier, cost, footprint, uses.get(tier, ())))
    return rows
