"""What went wrong in a round, and what was done about it: a row of the ledger (`events.parquet`) each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fedray.errors import ClientFailure, FedrayError, TrainingError, choices
from fedray.types import ClientId

Kind = Literal["exception", "actor died", "out of memory", "lost object", "timeout", "update rejected"]
Action = Literal["rerun", "left out", "run ended"]


@dataclass(frozen=True)
class TaskFailure:
    """Clients that came to nothing in their actor, which goes on.

    cause: one line. trace: where in the code, for what fedray does not know. rejected: their update is not usable; they
    did what they do, and would do it again. non_retryable: likewise their training.
    """

    clients: tuple[ClientId, ...]
    cause: str
    trace: str = ""
    rejected: bool = False
    non_retryable: bool = False


@dataclass(frozen=True)
class FailedAttempt:
    """A turn that came to nothing.

    number: of the clients' attempts in this round that failed. node: where; empty without Ray. exhausted: they are not
    run again in this round. trace: as of `TaskFailure`.
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
        """Return what ends the run because of this."""
        if self.non_retryable:
            return TrainingError(self.cause)
        times = f"{self.number} times" if self.number > 1 else "once"
        return ClientFailure(
            f"client {choices(self.clients)}: failed {times} in round {self.server_round}, the last time by "
            f"{self.kind}{f' on {self.node}' if self.node else ''}: {self.cause}; see clients.max_failures and "
            f"clients.on_failure{self.trace and chr(10)}{self.trace}"
        )


def too_few(server_round: int, came: int, least: int, attempts: Sequence[FailedAttempt]) -> ClientFailure:
    """Return what ends a round to which fewer than `clients.min_clients` came."""
    causes = "\n".join(f"  {choices(attempt.clients)}: {attempt.kind}: {attempt.cause}" for attempt in attempts)
    return ClientFailure(
        f"round {server_round}: {came} clients came, fewer than clients.min_clients={least}; left out were\n{causes}"
    )
