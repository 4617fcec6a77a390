"""The events of an experiment: one vocabulary for the console, sweeps, jobs and users' callbacks."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedray.config import Config
from fedray.config.tracker import EndStatus
from fedray.federation.failures import FailedAttempt
from fedray.federation.summary import Summary
from fedray.storage.paths import StoragePath
from fedray.types import ClientId


@dataclass(frozen=True)
class RunStarted:
    """A run begins or is continued, or its driver was started again.

    Attributes:
        place: the run's folder, which exists.
        config: the resolved configuration.
        trial: id of the sweep's trial; empty outside of sweeps.
    """

    place: StoragePath
    config: Config
    trial: str = ""


@dataclass(frozen=True)
class MethodStarted:
    """A method begins, or is continued.

    Attributes:
        tasks: client tasks of all rounds and of the final pass.
        server_round: rounds that the method has already.
        tasks_done: client tasks of those rounds.
    """

    method: str
    rounds: int
    tasks: int
    server_round: int = 0
    tasks_done: int = 0


@dataclass(frozen=True)
class TasksFinished:
    """Clients finished their tasks."""

    method: str
    server_round: int
    clients: tuple[ClientId, ...]


@dataclass(frozen=True)
class TaskFailed:
    """An attempt at some clients' tasks failed."""

    method: str
    attempt: FailedAttempt


@dataclass(frozen=True)
class RoundFinished:
    """A round was aggregated, or the final pass ended.

    Attributes:
        server_round: from 0; of the final pass, the number of rounds.
        aggregated, personalised: the metric's mean over clients right after aggregation and after local training, on
            their test examples; None if it was not measured.
        validation_aggregated, validation_personalised: the same on their validation examples.
        train_loss: mean over clients; None if no client took part.
        seconds: on this machine.
        simulated_seconds: on the clients' devices, until the last update that the server waited for.
        metrics: what the method's server reports.
        trial: id of the sweep's trial; empty outside of sweeps.
    """

    method: str
    server_round: int
    final: bool
    aggregated: float | None
    personalised: float | None
    train_loss: float | None
    uplink_bytes: int
    downlink_bytes: int
    seconds: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    trial: str = ""
    validation_aggregated: float | None = None
    validation_personalised: float | None = None
    simulated_seconds: float = 0.0


@dataclass(frozen=True)
class MethodFinished:
    """A method has all its rounds."""

    summary: Summary


@dataclass(frozen=True)
class RunFinished:
    """A run that had started has ended, and everything that it leaves is in its folder.

    Attributes:
        error: why it failed; empty otherwise.
    """

    place: StoragePath
    status: EndStatus
    error: str = ""


@dataclass(frozen=True)
class SweepStarted:
    """A sweep begins or is continued.

    Attributes:
        place: the sweep's folder, which exists.
        config: the sweep's configuration.
    """

    place: StoragePath
    config: Mapping[str, Any]


@dataclass(frozen=True)
class SweepFinished:
    """A sweep that had started has ended.

    Attributes:
        error: why it failed; empty otherwise.
        trials: the rows of `SweepResult.to_pandas`.
    """

    place: StoragePath
    status: EndStatus
    error: str
    trials: Sequence[Mapping[Any, Any]]


Event = RunStarted | MethodStarted | TasksFinished | TaskFailed | RoundFinished | MethodFinished


class Callback:
    """Receives what happens, in the process that started the run or the sweep. Override what you need.

    A sweep calls `on_sweep_started`, for each trial `on_run_started` and `on_round_finished` with `trial` set and
    `on_trial_finished`, and `on_sweep_finished`. The events of a trial come whenever a round has the sweep's metric,
    and at the trial's end.
    """

    def on_event(self, event: Any) -> None:
        """Receive any event: call the method that is named after the event's class."""
        name = re.sub(r"[A-Z]", lambda letter: f"_{letter[0].lower()}", type(event).__name__)
        getattr(self, f"on{name}")(event)

    def on_run_started(self, event: RunStarted) -> None:
        """A run begins or is continued, or its driver was started again."""

    def on_method_started(self, event: MethodStarted) -> None:
        """A method begins, or is continued."""

    def on_tasks_finished(self, event: TasksFinished) -> None:
        """Clients finished their tasks."""

    def on_task_failed(self, event: TaskFailed) -> None:
        """An attempt at some clients' tasks failed."""

    def on_round_finished(self, event: RoundFinished) -> None:
        """A round was aggregated, or the final pass ended."""

    def on_method_finished(self, event: MethodFinished) -> None:
        """A method has all its rounds."""

    def on_run_finished(self, event: RunFinished) -> None:
        """A run that had started has ended; `on_run_finished` is called if it failed, too."""

    def on_sweep_started(self, event: SweepStarted) -> None:
        """A sweep begins or is continued."""

    def on_trial_finished(self, event: Any) -> None:
        """A trial of a sweep ended (`fedray.sweeps.result.TrialFinished`)."""

    def on_sweep_finished(self, event: SweepFinished) -> None:
        """A sweep that had started has ended."""
