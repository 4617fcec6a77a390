"""The callback that keeps one tracker up to date with a run, or with a sweep and its trials.

A tracker never ends a run. What it raises is one warning and a row of the run's event log. After that the tracker
rests: a server that does not answer would make every round wait. It is tried once more at the end of the run or of the
sweep, and then logs everything that it has missed.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from fedray.config import TrackedRun, Tracker, to_mapping
from fedray.config.tracker import EndStatus
from fedray.errors import one_line
from fedray.evaluation.metrics import configured_metric
from fedray.federation.events import (
    Callback,
    RoundFinished,
    RunFinished,
    RunStarted,
    SweepFinished,
    SweepStarted,
)
from fedray.storage.paths import StoragePath
from fedray.tracking.followed import Followed

log = logging.getLogger(__name__)

TRIAL_ENDS: Mapping[str, EndStatus] = {"finished": "finished", "stopped": "stopped"}
"""How a trial ended, by its status; otherwise it failed."""


@dataclass(frozen=True)
class TrackerFailure:
    """What a tracker raised.

    Attributes:
        method, server_round: what was being logged; the method is empty before the first round.
    """

    tracker: str
    method: str
    server_round: int
    cause: str


Record = Callable[[StoragePath, TrackerFailure], None]
"""Writes a failure to the event log of a run's folder, which no other process writes to at that time."""


class Tracking(Callback):
    """Keeps a tracker up to date.

    Args:
        key: name of the tracker, unique within the run.
        record: writes failures to the event log, when the run or the sweep has ended.
    """

    def __init__(self, tracker: Tracker, key: str, record: Record):
        self._tracker, self._key, self._record = tracker, key, record
        self._runs: dict[str, Followed] = {}
        self._sweep: Followed | None = None
        self._late: list[tuple[Followed, EndStatus]] = []
        self._failures: list[tuple[StoragePath, TrackerFailure]] = []

    def on_run_started(self, event: RunStarted) -> None:
        """Begin the run, or continue it; its driver may have been started again."""
        if event.trial in self._runs:
            return
        group = self._sweep.place.name if self._sweep else ""
        name = f"{group}/{event.trial}" if event.trial else event.place.name
        run = self._tracked(event.place, name, group, to_mapping(event.config))
        metric = configured_metric(event.config).label
        self._runs[event.trial] = Followed(self._tracker, self._key, event.place, run, metric)
        self._update(event.trial)

    def on_round_finished(self, event: RoundFinished) -> None:
        """Log the round."""
        self._update(event.trial)

    def on_run_finished(self, event: RunFinished) -> None:
        """Log what is missing, the tables and the report."""
        for run in self._runs.values():
            self._try(run, partial(run.end, event.status))
        self._runs = {}
        self._write_failures()

    def on_sweep_started(self, event: SweepStarted) -> None:
        """Begin the run that stands for the sweep itself."""
        run = self._tracked(event.place, event.place.name, event.place.name, event.config)
        self._sweep = Followed(self._tracker, self._key, event.place, run)
        self._try(self._sweep, self._sweep.catch_up)

    def on_trial_finished(self, event: Any) -> None:
        """Log what is missing of the trial, and its tables."""
        if (run := self._runs.pop(event.trial.id, None)) is None:  # it failed before it began
            return
        status = TRIAL_ENDS.get(event.result.status, "failed")
        if self._failures or not self._try(run, partial(run.end, status)):
            self._late.append((run, status))

    def on_sweep_finished(self, event: SweepFinished) -> None:
        """Log the table of trials and the report, and close trials that are still open."""
        assert self._sweep is not None
        answers = True
        for run, status in [*self._late, *((run, event.status) for run in self._runs.values())]:
            answers = answers and self._try(run, partial(run.end, status))
        self._try(self._sweep, partial(self._sweep.end, event.status, {"trials": event.trials}))
        self._runs, self._late = {}, []
        self._write_failures()

    def _tracked(self, place: StoragePath, name: str, group: str, config: Mapping[str, Any]) -> TrackedRun:
        return TrackedRun(name, group, config, place.local if place.filesystem is None else None)

    def _update(self, trial: str) -> None:
        if not self._failures and (run := self._runs.get(trial)) is not None:
            self._try(run, run.catch_up)

    def _try(self, run: Followed, action: Callable[[], None]) -> bool:
        """Call the tracker and return whether it succeeds; keep what it raises, and log the first time as a warning."""
        try:
            action()
            return True
        except Exception as error:
            cause = f"{type(error).__name__}: {one_line(error)}"
            if not self._failures:
                log.warning("tracker %s: %s; the run is not affected", self._key, cause)
            self._failures.append((run.place, TrackerFailure(self._key, *run.at, cause)))
            return False

    def _write_failures(self) -> None:
        for place, failure in self._failures:
            try:
                self._record(place, failure)
            except Exception as error:
                log.warning("tracker %s: its failure is not in the event log: %s", self._key, error)
        self._failures = []
