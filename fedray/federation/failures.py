"""Failures in a round, and what was done about them: each failure is a row of the event log (`events.parquet`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fedray.errors import ClientFailure, FedrayError, TrainingError, choices
from fedray.types import ClientId, round_number

Kind = Literal["exception", "actor died", "out of memory", "lost object", "timeout", "update rejected"]
Action = Literal["rerun", "left out", "run ended"]


@dataclass(frozen=True)
class TaskFailure:
    """Client tasks that failed while their actor continues.

    Attributes:
        cause: one line.
        trace: the traceback of an exception that is not a FedrayError.
        rejected: whether the update is not usable; another attempt would bring the same one.
        non_retryable: whether training itself fails, and would fail again.
    """

    clients: tuple[ClientId, ...]
    cause: str
    trace: str = ""
    rejected: bool = False
    non_retryable: bool = False


@dataclass(frozen=True)
class FailedAttempt:
    """An attempt at some clients' tasks that failed.

    Attributes:
        number: of these clients' failed attempts in this round, from 1.
        node: where it failed; empty without Ray.
        exhausted: whether the tasks are not run again in this round.
        non_retryable, trace: as in `TaskFailure`.
        action: what was done about it.
    """

    server_round: int
    clients: tuple[ClientId, ...]
    number: int
    node: str
    kind: Kind
    cause: str
    exhausted: bool = False
    non_retryable: bool = False
    trace: str = ""
    action: Action = "rerun"

    def error(self) -> FedrayError:
        """Return the error that ends the run because of this attempt."""
        if self.non_retryable:
            return TrainingError(self.cause)
        times = f"{self.number} times" if self.number > 1 else "once"
        return ClientFailure(
            f"client {choices(self.clients)}: failed {times} in round {round_number(self.server_round)}, the last time "
            f"by {self.kind}{f' on {self.node}' if self.node else ''}: {self.cause}; see clients.max_failures and "
            f"clients.on_failure{self.trace and chr(10)}{self.trace}"
        )


def too_few(server_round: int, finished: int, minimum: int, attempts: Sequence[FailedAttempt]) -> ClientFailure:
    """Return the error that ends a round which fewer than `clients.min_clients` clients finished."""
    causes = "\n".join(f"  {choices(attempt.clients)}: {attempt.kind}: {attempt.cause}" for attempt in attempts)
    return ClientFailure(
        f"round {round_number(server_round)}: {finished} clients finished, fewer than clients.min_clients={minimum}; "
        f"left out:\n{causes}"
    )
