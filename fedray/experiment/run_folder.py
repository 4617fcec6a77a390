"""What a run leaves on disk, written after every round: a run that is interrupted keeps all finished rounds.

DIR/config.yaml         the resolved configuration
DIR/rounds.parquet      one row per method and round
DIR/clients.parquet     one row per method, round and client
DIR/evaluations.parquet one row per method, round, client, moment, examples, group of examples and metric
                        (`evaluation_rows`); exists once something was evaluated
DIR/examples.parquet    with `evaluation.examples`, one row per method, client, moment and example of the final pass
                        (`example_rows`)
DIR/events.parquet      the event log: one row per failed attempt (`FailedAttempt`), per interruption, and per failure
                        of a tracker; exists only if there is one
DIR/memory.parquet      one row per method and tier: predicted and measured peaks (`memory_row`)
DIR/partition.parquet   one row per client, split, and what is counted: how many examples a client has, of which classes
                        and tasks (`partition_rows`)
DIR/versions.json       the versions of Python and of packages, an entry for each process that had others
                        (`results.versions`)
DIR/report.html         with `report: true`, the report (`fedray.report`)
DIR/summary.json        one entry per finished method
DIR/adapters/METHOD/    server.safetensors (the server's state), and per client clients/ID.safetensors (the adapter
                        at the end of the final pass) and states/ID.safetensors (the private state after
                        the last round); ID is made a file name by `storage.paths.safe_name`
DIR/states/METHOD/      the clients' states as the next round reads them (`StateFiles`)
DIR/checkpoints/METHOD/ what the method can be continued from (`Checkpoints`)
DIR/trackers/           what trackers know of the run (`tracking.followed`), and files of their own
DIR/.lock               held by the process that writes here, on this machine's file systems

While a method runs, and after its process was killed, recent rows of a table can be in side files (`storage.tables`).
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout

from fedray.config import Config, dump_yaml
from fedray.errors import ConfigError, StateError, StorageError, reason
from fedray.experiment.rows import Row, client_row, client_seconds, evaluation_rows, example_rows, round_row, strict
from fedray.federation.failures import FailedAttempt
from fedray.federation.rounds import RoundResult
from fedray.federation.summary import Summary
from fedray.results.run_result import read_config, read_summaries
from fedray.results.versions import write_versions
from fedray.storage.paths import StoragePath, safe_name
from fedray.storage.state_tree import arrays, save_tensors
from fedray.storage.tables import Table
from fedray.tracking.callback import TrackerFailure
from fedray.types import ClientId

TABLES = ("rounds", "clients", "evaluations", "examples", "events", "memory", "partition")

LOCK = ".lock"
LOCK_PATIENCE_S = 10.0
"""Seconds that a killed driver may take to release the lock."""


class RunFolder:
    """The folder of one run. No other process can write to it until `close`.

    Args:
        resume: whether the folder exists, with a configuration that `resume.continued` has accepted.

    Raises:
        ConfigError: the folder of a new run exists and is not empty, or another process writes to it.
        StateError: a table of the folder cannot be read.
        StorageError: the folder cannot be written.
    """

    def __init__(self, place: StoragePath, config: Config, resume: bool = False):
        self.place, self.resumed = place, resume
        self._config, self._durable = config, config.checkpoint.every > 0
        self._tables = {name: Table(place, name, self._durable, self._in_order) for name in TABLES}
        self._summaries: list[Summary] = []
        if not resume:
            check_empty(place)
            place.make_folder()
        self._lock = lock_folder(place)
        try:
            if resume:
                for table in self._tables.values():
                    table.load()
                self._summaries = read_summaries(place)
            else:
                check_empty(place)  # another process may have started and finished here meanwhile
            self._write("config.yaml", dump_yaml(config).encode())
            write_versions(place, self._durable)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Put every table into one file if possible, and release the folder's lock."""
        try:
            for table in self._tables.values():
                with suppress(StateError):
                    table.compact()
        finally:
            if self._lock is not None:
                self._lock.release()

    def finished(self, method: str) -> Summary | None:
        """Return the summary of a method that already has all its rounds; None if rounds are missing.

        Raises:
            ConfigError: the method has more rounds than the configuration.
        """
        found = next((summary for summary in self._summaries if summary.method == method), None)
        if found is not None and found.rounds > self._config.rounds:
            raise ConfigError(f"rounds: {self._config.rounds}, but {method} of {self.place} already has {found.rounds}")
        return found if found is not None and found.rounds == self._config.rounds else None

    def begin(self, method: str, server_round: int | None) -> None:
        """Prepare the folder for a method's rounds.

        Args:
            server_round: number of finished rounds after which the method continues; None if it begins.

        Raises:
            StateError: the method has recorded rounds, but no checkpoint to continue from.
            ConfigError: the method has more rounds than the configuration.
        """
        have = [row for row in self._tables["rounds"].rows() if row["method"] == method]
        if have and server_round is None:
            raise StateError(
                f"{self.place}: {method} has {len(have)} recorded rounds, but no checkpoint to continue from "
                "(checkpoint.every: 0 saves none)"
            )
        if server_round is not None and server_round > self._config.rounds:
            raise ConfigError(f"rounds: {self._config.rounds}, but {method} of {self.place} already has {server_round}")
        if have:
            self._rewind(method, server_round or 0)
        (self.place / "states" / method).make_folder()

    def record(self, method: str, done: RoundResult) -> Row:
        """Append a round (or the final pass), its clients and their evaluations to the tables, and write them; return
        the round's row."""
        phase = "final" if done.final else "train"
        simulated = client_seconds(self._config.clients, done)
        row = {"method": method, "phase": phase, **round_row(done, simulated)}
        clients = [
            {"method": method, "phase": phase, **client_row(result, simulated[result.client.id])}
            for result in done.results
        ]
        self._tables["rounds"].append([row])
        self._tables["clients"].append(clients)
        if rows := [entry for result in done.results for entry in evaluation_rows(result)]:
            self._tables["evaluations"].append([{"method": method, "phase": phase, **entry} for entry in rows])
        if rows := [entry for result in done.results for entry in example_rows(result)]:
            self._tables["examples"].append([{"method": method, **entry} for entry in rows])
        return row

    def record_attempt(self, method: str, attempt: FailedAttempt) -> None:
        """Append a failed attempt to the event log, and write it."""
        row = event_row(
            method,
            attempt.server_round,
            attempt.kind,
            attempt.cause,
            attempt.action,
            attempt.clients,
            attempt.number,
            attempt.node,
        )
        self._tables["events"].append([row])

    def record_continued(self, method: str, server_round: int, broken: Sequence[str]) -> None:
        """Append to the event log that a method continues after `server_round` rounds, and which checkpoints are
        broken."""
        rows = [event_row(method, server_round, "checkpoint broken", cause, "an older one is used") for cause in broken]
        rows.append(event_row(method, server_round, "interrupted", "", f"continued after {server_round} rounds"))
        self._tables["events"].append(rows)

    def record_data(self, rows: Callable[[], Sequence[Row]]) -> None:
        """Write partition.parquet, unless a continued run has it: its data are the same."""
        if not self._tables["partition"].rows():
            self._tables["partition"].append(rows())

    def record_memory(self, rows: Sequence[Row]) -> None:
        """Append a finished method's rows to memory.parquet, and write it."""
        self._tables["memory"].append(rows)

    def write_states(self, method: str, states: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """Write a finished method's states, and pass them on, with one in memory at a time."""
        folder = self.place / "adapters" / method
        for name, state in states:
            kind, _, id = name.partition("/")
            place = folder / "states" / f"{safe_name(id)}.safetensors" if id else folder / f"{kind}.safetensors"
            save_tensors(place, arrays(state), self._durable)
            yield name, state

    def finish(self, summary: Summary) -> None:
        """Write a finished method's entry of summary.json, and every table as one file."""
        for table in self._tables.values():
            table.compact()
        if not self._durable:  # the method cannot be continued, so its working files are deleted
            (self.place / "states" / summary.method).remove()
            with suppress(StorageError):
                if not (self.place / "states").names():
                    (self.place / "states").remove()
        places = [entry.key for entry in self._config.method]
        self._summaries = sorted([*self._summaries, summary], key=lambda one: places.index(one.method))
        entries = [{name: strict(value) for name, value in asdict(entry).items()} for entry in self._summaries]
        self._write("summary.json", (json.dumps(entries, indent=2, allow_nan=False) + "\n").encode())

    def _rewind(self, method: str, server_round: int) -> None:
        """Drop the records of a method from `server_round` on: these rounds run again."""

        def stays(row: Row) -> bool:
            return bool(row["method"] != method or (row["phase"] == "train" and row["server_round"] < server_round))

        for name in ("rounds", "clients", "evaluations"):
            self._tables[name].keep(stays)
        for name in ("examples", "memory"):
            self._tables[name].keep(lambda row: row["method"] != method)
        self._summaries = [summary for summary in self._summaries if summary.method != method]

    def _in_order(self, table: pa.Table) -> pa.Table:
        """Return the rows in the order of the methods: a continued method may not be the last one."""
        if not self.resumed or "method" not in table.column_names:
            return table
        places = [entry.key for entry in self._config.method]
        keys = [places.index(method) for method in table["method"].to_pylist()]
        return table.take(np.argsort(keys, kind="stable"))

    def _write(self, name: str, data: bytes) -> None:
        (self.place / name).write(data, self._durable)


def event_row(
    method: str,
    server_round: int,
    kind: str,
    cause: str,
    action: str,
    clients: Sequence[ClientId] = (),
    attempt: int = 0,
    node: str = "",
) -> Row:
    """Return a row of events.parquet, with the present time."""
    return {
        "time": datetime.now(UTC),
        "method": method,
        "server_round": server_round,
        "clients": list(clients),
        "attempt": attempt,
        "node": node,
        "kind": kind,
        "cause": cause,
        "action": action,
    }


def record_tracker_failure(place: StoragePath, failure: TrackerFailure) -> None:
    """Append what a tracker raised to the event log of a run that has ended. Sweeps have no event log.

    Raises:
        ConfigError: another process writes to the folder.
        StateError: the event log cannot be read or written.
    """
    if not (place / "config.yaml").is_file():
        return
    method = failure.method or read_config(place).method[0].key
    cause = f"{failure.tracker}: {failure.cause}"
    lock = lock_folder(place)
    try:
        table = Table(place, "events")
        table.load()
        table.append([event_row(method, failure.server_round, "tracker failed", cause, "the run continued")])
        table.compact()
    finally:
        if lock is not None:
            lock.release()


def check_empty(place: StoragePath) -> None:
    """Check that a new run or sweep can be written to a folder without overwriting anything.

    Raises:
        ConfigError: the folder exists and is not empty, or it cannot be created.
    """
    if place.is_file() or place.names() not in ([], [LOCK]):
        raise ConfigError(f"output {place}: exists and is not empty; name another folder with --output")
    if place.filesystem is None:
        parent = next(folder for folder in (place.local, *place.local.parents) if folder.exists())
        if not parent.is_dir():
            raise ConfigError(f"output {place}: {parent} is a file; name another folder with --output")
        if not os.access(parent, os.W_OK):
            raise ConfigError(f"output {place}: {parent} cannot be written to; name another folder with --output")


def lock_folder(place: StoragePath) -> FileLock | None:
    """Lock a folder; return the lock, or None if the file system has no locks.

    Raises:
        ConfigError: another process holds the lock.
        StorageError: the folder cannot be written.
    """
    if place.filesystem is not None:
        return None
    lock = FileLock(place.local / LOCK, thread_local=False)
    try:
        lock.acquire(timeout=LOCK_PATIENCE_S)
    except Timeout:
        raise ConfigError(f"{place}: another process is writing here; stop it, or wait until it ends") from None
    except NotImplementedError:  # a file system without locks
        return None
    except OSError as error:
        raise StorageError(f"{place}: cannot be written: {reason(error)}") from None
    return lock
