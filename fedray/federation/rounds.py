"""The federation: a round on one screen, whatever the clients run on.

`Pool` is where clients are trained: `pool.ClientPool` on Ray, `inline.LocalPool` in this process. Both give the same
bits: every draw is keyed, outcomes come in any order and are reduced in the order of client ids.
"""

from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Protocol

import numpy as np

from fedray.aggregation.pairwise import PairwiseMean
from fedray.config import Config, TrainConfig
from fedray.federation.failures import FailedAttempt, too_few
from fedray.federation.participation import Participation, cohort_size, select_participants
from fedray.federation.result_batches import ResultBatch
from fedray.federation.update_checks import outliers
from fedray.federation.worker import ClientTask, Keep, Outcome, WorkerSetup
from fedray.methods.protocol import AnyMethod, Initial, Metrics, Update
from fedray.randomness import keyed_rng
from fedray.storage.client_states import StateRef
from fedray.storage.state_tree import num_bytes, with_arrays
from fedray.training.metering import MemoryUse
from fedray.types import Client, ClientId


class Pool(Protocol):
    def setup(self, jobs: Mapping[str, WorkerSetup]) -> Initial:
        """Make ready for a method, given its job on each tier that has clients; return the common starting point."""
        ...

    def train(
        self,
        assignments: Sequence[ClientTask],
        downlinks: Mapping[ClientId, Any],
        states: Mapping[ClientId, StateRef],
    ) -> Iterator[ResultBatch | FailedAttempt]:
        """Yield all clients in completion order, and attempts that came to nothing."""
        ...

    def actors(self, tier: str) -> int:
        """Return how many actors serve the tier."""
        ...

    def width_seconds(
        self, assignments: Sequence[ClientTask], downlinks: Mapping[ClientId, Any]
    ) -> Mapping[int, float]:
        """Return the seconds that one of the tier's actors needs for the assignments, by how many clients it trains in
        one step (`Worker.width_seconds`)."""
        ...

    def fetch(self, refs: Sequence[StateRef]) -> Sequence[Any]:
        """Return the states."""
        ...

    def forget(self, refs: Sequence[StateRef]) -> None:
        """Let go of states that nobody needs any more."""
        ...

    def memory(self) -> Mapping[str, Sequence[MemoryUse]]:
        """Return what each process that trains has taken at most since `setup`, by tier."""
        ...


@dataclass(frozen=True)
class ClientsDone:
    """Clients finished their turns."""

    server_round: int
    clients: tuple[ClientId, ...]


@dataclass(frozen=True)
class RoundDone:
    """A round was aggregated. outcomes: in the order of client ids. attendance: who was asked and came (None in the
    final pass, to which everybody comes). left_out: of those who came, who failed or sent what cannot be used.
    replaced: states of clients that are not current any more; whoever records the round lets them go (`Pool.forget`).
    final: the last pass, nothing is sent up."""

    server_round: int
    outcomes: tuple[Outcome, ...]
    metrics: Metrics
    seconds: float
    attendance: Participation | None = None
    left_out: tuple[ClientId, ...] = ()
    replaced: tuple[StateRef, ...] = ()
    final: bool = False


Happened = ClientsDone | RoundDone | FailedAttempt


class Finished:
    """What the clients of one round brought, in whatever order."""

    def __init__(self) -> None:
        self.states: dict[ClientId, StateRef] = {}
        self.exhausted: list[FailedAttempt] = []
        self._outcomes: dict[ClientId, Outcome] = {}
        self._means: dict[str, PairwiseMean] = {}
        self._shapes: dict[str, Any] = {}

    def add(self, block: ResultBatch) -> None:
        for outcome, state in zip(block.outcomes, block.states, strict=True):
            self._outcomes[outcome.update.client.id] = outcome
            if state is not None:
                self.states[outcome.update.client.id] = state
        for node in block.means:
            tier = block.outcomes[0].update.client.tier
            self._means.setdefault(tier, PairwiseMean()).add(node)
            self._shapes[tier] = block.shape

    def reject(self, attempt: FailedAttempt) -> None:
        """Leave out clients whose updates travel one by one."""
        self.exhausted.append(attempt)
        for id in attempt.clients:
            del self._outcomes[id]
            self.states.pop(id, None)

    @property
    def left_out(self) -> tuple[ClientId, ...]:
        return tuple(sorted(id for attempt in self.exhausted for id in attempt.clients))

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """In the order of client ids."""
        return tuple(self._outcomes[id] for id in sorted(self._outcomes))

    def updates(self) -> list[Update[Any]]:
        """Return the updates to aggregate: all in the order of client ids, or one of each tier where they were averaged
        (`Update`)."""
        updates = [outcome.update for outcome in self.outcomes]
        if not self._means:
            return updates
        merged = []
        for tier in sorted(self._means):
            mine = [update for update in updates if update.client.tier == tier]
            mean = self._means[tier].total()
            assert mean is not None
            assert mean.leaves == len(mine), "every client's update is in the mean once"
            payload = with_arrays(self._shapes[tier], iter(mean.arrays))
            merged.append(Update(mine[0].client, sum(update.num_examples for update in mine), payload, len(mine)))
        return merged


class Federation:
    """One method on one population of clients.

    The state is `server_round`, `server` and `client_states` (where the states of those who have trained are), nothing
    else.

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
        self.client_states: dict[ClientId, StateRef] = {}

    def restore(self, server_round: int, server: Any, client_states: Mapping[ClientId, StateRef]) -> None:
        """Go on from the state after some rounds."""
        self.server_round, self.server, self.client_states = server_round, server, dict(client_states)

    def run(self) -> Iterator[Happened]:
        """Train all rounds, then let every client take the result home (`final_pass`)."""
        while self.server_round < self.config.rounds:
            yield from self.round()
        yield from self.final_pass()

    def round(self) -> Iterator[Happened]:
        started = perf_counter()
        cohort = sample_cohort(self.clients, self.config, self.server_round)
        downlinks = self.method.configure_train(self.server, cohort)
        measure = self.config.evaluation.every > 0 and self.server_round % self.config.evaluation.every == 0
        attendance = self._attend(cohort, downlinks)
        finished = yield from self._train(self._assign(attendance.present, measure, "state"), downlinks)
        self.server, metrics = self.method.aggregate_train(self.server, finished.updates())
        replaced = tuple(self.client_states[id] for id in finished.states if id in self.client_states)
        self.client_states |= finished.states
        self.server_round += 1
        seconds = perf_counter() - started
        yield RoundDone(
            self.server_round - 1, finished.outcomes, metrics, seconds, attendance, finished.left_out, replaced
        )

    def final_pass(self) -> Iterator[Happened]:
        """The final pass over all clients: download, evaluate (`aggregated`), train once more, evaluate
        (`personalised`). Nothing is sent up, and neither the server's nor a client's state changes."""
        started = perf_counter()
        downlinks = self.method.configure_train(self.server, self.clients)
        finished = yield from self._train(self._assign(self.clients, True, "adapter"), downlinks)
        outcomes = tuple(replace(outcome, uplink_bytes=0) for outcome in finished.outcomes)
        seconds, left_out = perf_counter() - started, finished.left_out
        yield RoundDone(self.server_round, outcomes, {}, seconds, left_out=left_out, final=True)

    def states(self) -> Iterator[tuple[str, Any]]:
        """Yield each trained client's state as "client/ID", in the order of ids, one in memory at a time; then the
        server's as "server"."""
        for id in sorted(self.client_states):
            (state,) = self.pool.fetch([self.client_states[id]])
            yield f"client/{id}", state
        yield "server", self.server

    def _attend(self, cohort: Sequence[Client], downlinks: Mapping[ClientId, Any]) -> Participation:
        distinct = {id(payload): payload for payload in downlinks.values()}
        sizes = {key: num_bytes(payload) for key, payload in distinct.items()}
        return select_participants(
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
        self, assignments: Sequence[ClientTask], downlinks: Mapping[ClientId, Any]
    ) -> Generator[ClientsDone | FailedAttempt, None, Finished]:
        """Yield clients as they finish, and what failed; return what they brought.

        Raises:
            FedrayError: a client failed for good and `clients.on_failure` says that this ends the run, or too few are
                left.
        """
        finished, clients = Finished(), self.config.clients
        for found in self.pool.train(assignments, downlinks, self.client_states):
            if isinstance(found, ResultBatch):
                finished.add(found)
                yield ClientsDone(self.server_round, tuple(outcome.update.client.id for outcome in found.outcomes))
            elif not found.exhausted:
                yield found
            elif found.kind == "update rejected" or clients.on_failure == "drop":
                yield replace(found, action="left out")
                finished.exhausted.append(found)
            else:
                yield replace(found, action="run ended")
                raise found.error()
        if clients.update_checks.compare:
            payloads = {outcome.update.client.id: outcome.update.payload for outcome in finished.outcomes}
            for id, cause in outliers(payloads, clients.update_checks).items():
                attempt = FailedAttempt(self.server_round, (id,), 1, "", "update rejected", cause, exhausted=True)
                yield replace(attempt, action="left out")
                finished.reject(attempt)
        if finished.exhausted and len(finished.outcomes) < clients.min_clients:
            raise too_few(self.server_round, len(finished.outcomes), clients.min_clients, finished.exhausted)
        return finished

    def _assign(self, cohort: Sequence[Client], measure: bool, keep: Keep) -> list[ClientTask]:
        """Largest clients first, so that nobody waits for one that began last."""
        ordered = sorted(cohort, key=lambda client: (-client.num_examples, client.id))
        places: Counter[str] = Counter()
        assignments = []
        for client in ordered:
            assignments.append(ClientTask(client, self.server_round, measure, keep, places[client.tier]))
            places[client.tier] += 1
        return assignments


def sample_cohort(clients: Sequence[Client], config: Config, server_round: int) -> list[Client]:
    """Return the round's cohort in the order of client ids, drawn without replacement by (seed, round)."""
    size = cohort_size(config.clients, len(clients))
    chosen = keyed_rng(config.seed, "cohort", server_round).choice(len(clients), size=size, replace=False)
    return [clients[index] for index in np.sort(chosen)]
