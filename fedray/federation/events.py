"""What happens in an experiment, as everything that follows it is told: console, sweeps, jobs, callbacks."""

from dataclasses import dataclass

from fedray.federation.failures import FailedAttempt
from fedray.federation.summary import Summary


@dataclass(frozen=True)
class MethodStarted:
    method: str
    rounds: int
    turns: int
    """Clients' turns in all rounds and the final pass."""
    server_round: int = 0
    """Rounds that it has already."""
    turns_done: int = 0


@dataclass(frozen=True)
class TasksFinished:
    method: str
    server_round: int
    clients: tuple[str, ...]


@dataclass(frozen=True)
class TaskFailed:
    method: str
    attempt: FailedAttempt


@dataclass(frozen=True)
class RoundFinished:
    method: str
    server_round: int
    final: bool
    aggregated: float | None
    personalised: float | None
    train_loss: float | None
    seconds: float
    bytes: int
    """Sent up and down."""


@dataclass(frozen=True)
class MethodFinished:
    summary: Summary


Event = MethodStarted | TasksFinished | TaskFailed | RoundFinished | MethodFinished
