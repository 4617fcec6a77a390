"""The federation: a round on one screen, whatever the clients run on.

`Pool` is where clients are trained: `pool.ClientPool` on Ray, `inline.InlinePool` in this process. Both give the same
bits: every draw is keyed, outcomes come in any order and are reduced in the order of client ids.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Protocol

import numpy as np

from fedray.config import Config, TrainConfig
from fedray.devices import Attendance, attend, cohort_size
from fedray.methods.protocol import AnyMethod, Initial, Metrics
from fedray.randomness import keyed_rng
from fedray.state import num_bytes
from fedray.training.metering import MemoryUse
from fedray.types import Client, ClientId
from fedray.worker import Assignment, Job, Outcome

Handle = Any
"""A client's state, or a reference to it; only the pool looks inside."""


class Pool(Protocol):
    def setup(self, jobs: Mapping[str, Job]) -> Initial:
        """Make ready for a method, given its job on each tier that has clients; return the common starting point."""
        ...

    def train(
        self,
        assignments: Sequence[Assignment],
        downlinks: Mapping[ClientId, Any],
        states: Mapping[ClientId, Handle],
    ) -> Iterator[tuple[Outcome, Handle]]:
        """Yield every client's outcome and the handle of its next state, in completion order."""
        ...

    def fuse_width(self, assignments: Sequence[Assignment], downlinks: Mapping[ClientId, Any]) -> int:
        """Return how many clients of the assignments' tier are best trained in one step (`Worker.fuse_width`)."""
        ...

    def fetch(self, handle: Handle) -> Any:
        """Return the state behind a handle."""
        ...

    def memory(self) -> Mapping[str, Sequence[MemoryUse]]:
        """Return what each process that trains has taken at most since `setup`, by tier."""
        ...


@dataclass(frozen=True)
class ClientDone:
    """A client finished its turn."""

    server_round: int
    outcome: Outcome


@dataclass(frozen=True)
class RoundDone:
    """A round was aggregated. outcomes: in the order of client ids. attendance: who was asked and came (None in the
    final pass, to which everybody comes). final: the last pass, nothing is sent up."""

    server_round: int
    outcomes: tuple[Outcome, ...]
    metrics: Metrics
    seconds: float
    attendance: Attendance | None = None
    final: bool = False


class Federation:
    """One method on one population of clients.

    The state is `server_round`, `server` and `client_states` (handles of those who have trained), nothing else.

    train, up_bytes: by tier, how a client trains with this method and how many bytes it sends.
    """

    def __init__(
        self,
        config: Config,
        method: AnyMethod,
        clients: Sequence[Client],
        initial: Initial,
        pool: Pool,
        train: Mapping[str, TrainConfig],
        up_bytes: Mapping[str, int],
    ):
        self.config, self.method, self.clients, self.pool = config, method, tuple(clients), pool
        self.train, self.up_bytes = train, up_bytes
        self.server_round = 0
        self.server = method.init_server(initial, self.clients)
        self.client_states: dict[ClientId, Handle] = {}

    def run(self) -> Iterator[ClientDone | RoundDone]:
        """Train all rounds, then let every client take the result home (`take_home`)."""
        while self.server_round < self.config.rounds:
            yield from self.round()
        yield from self.take_home()

    def round(self) -> Iterator[ClientDone | RoundDone]:
        started = perf_counter()
        cohort = sample_cohort(self.clients, self.config, self.server_round)
        downlinks = self.method.configure_train(self.server, cohort)
        measure = self.config.evaluation.every > 0 and self.server_round % self.config.evaluation.every == 0
        attendance = self._attend(cohort, downlinks)
        finished = yield from self._train(self._assign(attendance.present, measure), downlinks)
        outcomes = tuple(outcome for outcome, _ in finished)
        self.client_states |= {outcome.update.client.id: state for outcome, state in finished}
        self.server, metrics = self.method.aggregate_train(self.server, [outcome.update for outcome in outcomes])
        yield RoundDone(self.server_round, outcomes, metrics, perf_counter() - started, attendance)
        self.server_round += 1

    def take_home(self) -> Iterator[ClientDone | RoundDone]:
        """The final pass over all clients: download, evaluate (`aggregated`), train once more, evaluate
        (`personalised`). Nothing is sent up, and neither the server's nor a client's state changes."""
        started = perf_counter()
        downlinks = self.method.configure_train(self.server, self.clients)
        finished = yield from self._train(self._assign(self.clients, measure=True, keep=True), downlinks)
        outcomes = tuple(replace(outcome, uplink_bytes=0) for outcome, _ in finished)
        yield RoundDone(self.server_round, outcomes, {}, perf_counter() - started, final=True)

    def states(self) -> dict[str, Any]:
        """Return the server's state as "server", and each trained client's as "client/ID"."""
        clients = {f"client/{id}": self.pool.fetch(self.client_states[id]) for id in sorted(self.client_states)}
        return {"server": self.server, **clients}

    def _attend(self, cohort: Sequence[Client], downlinks: Mapping[ClientId, Any]) -> Attendance:
        distinct = {id(payload): payload for payload in downlinks.values()}
        sizes = {key: num_bytes(payload) for key, payload in distinct.items()}
        return attend(
            self.config.clients,
            self.config.seed,
            self.server_round,
            cohort,
            len(self.clients),
            self.train,
            {client.id: sizes[id(downlinks[client.id])] for client in cohort},
            self.up_bytes,
        )

    def _train(
        self, assignments: Sequence[Assignment], downlinks: Mapping[ClientId, Any]
    ) -> Generator[ClientDone, None, list[tuple[Outcome, Handle]]]:
        """Yield clients as they finish; return their outcomes and next states in the order of client ids."""
        finished: dict[ClientId, tuple[Outcome, Handle]] = {}
        for outcome, state in self.pool.train(assignments, downlinks, self.client_states):
            finished[outcome.update.client.id] = (outcome, state)
            yield ClientDone(self.server_round, outcome)
        return [finished[id] for id in sorted(finished)]

    def _assign(self, cohort: Sequence[Client], measure: bool, keep: bool = False) -> list[Assignment]:
        """Largest clients first, so that nobody waits for one that began last."""
        ordered = sorted(cohort, key=lambda client: (-client.num_examples, client.id))
        return [Assignment(client, self.server_round, measure, keep) for client in ordered]


def sample_cohort(clients: Sequence[Client], config: Config, server_round: int) -> list[Client]:
    """Return the round's cohort in the order of client ids, drawn without replacement by (seed, round)."""
    size = cohort_size(config.clients, len(clients))
    chosen = keyed_rng(config.seed, "cohort", server_round).choice(len(clients), size=size, replace=False)
    return [clients[index] for index in np.sort(chosen)]
