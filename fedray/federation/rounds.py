"""The federation: a round on one screen, independent of what the clients run on.

A `Pool` trains clients: `runtime.pool.ClientPool` on Ray, `local_pool.LocalPool` in this process. Both give the same
bits: every draw is keyed, and results arrive in any order but are reduced in the order of client ids.
"""

from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Protocol

import numpy as np

from fedray.aggregation.pairwise import PairwiseMean
from fedray.config import Config, TrainConfig
from fedray.errors import FedrayError
from fedray.federation.events import TaskFailed, TasksFinished
from fedray.federation.failures import FailedAttempt, too_few
from fedray.federation.participation import Participation, cohort_size, select_participants
from fedray.federation.result_batches import ResultBatch
from fedray.federation.tasks import ClientResult, ClientTask, Downlink, Keep, WorkerSetup, downlinks_of
from fedray.federation.update_checks import outliers
from fedray.methods.protocol import AnyMethod, Initial, Metrics, TierMean, Update, Uploaded
from fedray.randomness import keyed_rng
from fedray.storage.client_states import StateRef
from fedray.storage.state_tree import sha256, with_arrays
from fedray.training.metering import MemoryUse
from fedray.types import Client, ClientId


class Pool(Protocol):
    """Where clients are trained."""

    def setup(self, setups: Mapping[str, WorkerSetup]) -> Initial:
        """Prepare each tier that has clients for a method, and return the common starting point."""
        ...

    def train(self, tasks: Sequence[ClientTask]) -> Iterator[ResultBatch | FailedAttempt | None]:
        """Yield the results of all tasks in completion order, and failed attempts; before them None, if the first tasks
        run meanwhile and the caller has time for other work."""
        ...

    def actors(self, tier: str) -> int:
        """Return how many actors serve the tier."""
        ...

    def width_seconds(self, tasks: Sequence[ClientTask]) -> Mapping[int, float]:
        """Return the seconds that one of the tier's actors needs for the tasks, by how many clients it trains in one
        step (`Worker.width_seconds`)."""
        ...

    def gpu_memory(self, tier: str) -> int | None:
        """Return the bytes of a GPU that one of the tier's actors may take (`metering.gpu_memory`); None if it has no
        GPU. Known before `setup`."""
        ...

    def fetch(self, refs: Sequence[StateRef]) -> Sequence[Any]:
        """Return the states."""
        ...

    def forget(self, refs: Sequence[StateRef]) -> None:
        """Delete states that are not needed any more."""
        ...

    def memory(self) -> Mapping[str, Sequence[MemoryUse]]:
        """Return by tier the peak memory of each process that trains, since `setup`."""
        ...


@dataclass(frozen=True)
class RoundResult:
    """An aggregated round, or the final pass.

    Attributes:
        results: in the order of client ids.
        metrics: of the method's server.
        seconds: on this machine; if the round before was written meanwhile, with that.
        participation: who took part; None in the final pass, in which all clients do.
        left_out: participants that failed, or sent an update that cannot be used.
        replaced: states of clients that are not current any more; `Pool.forget` deletes them once the round is
            recorded.
        final: whether this is the final pass, in which nothing is sent up.
    """

    server_round: int
    results: tuple[ClientResult, ...]
    metrics: Metrics
    seconds: float
    participation: Participation | None = None
    left_out: tuple[ClientId, ...] = ()
    replaced: tuple[StateRef, ...] = ()
    final: bool = False


Round = Generator[TasksFinished | TaskFailed | None, None, RoundResult]
"""Yields what happens and returns the round's result; None as `Pool.train` does."""


class Collected:
    """What the clients of one round brought, in any order."""

    def __init__(self) -> None:
        self.exhausted: list[FailedAttempt] = []
        self._results: dict[ClientId, ClientResult] = {}
        self._means: dict[str, PairwiseMean] = {}
        self._structures: dict[str, Any] = {}

    def add(self, batch: ResultBatch) -> None:
        """Add a batch of results and its means."""
        self._results |= {result.client.id: result for result in batch.results}
        for node in batch.means:
            tier = batch.results[0].client.tier
            self._means.setdefault(tier, PairwiseMean()).add(node)
            self._structures[tier] = batch.structure

    def reject(self, attempt: FailedAttempt) -> None:
        """Leave out clients whose updates travel one by one."""
        self.exhausted.append(attempt)
        for id in attempt.clients:
            del self._results[id]

    @property
    def left_out(self) -> tuple[ClientId, ...]:
        """Ids of the clients that failed or sent an unusable update, sorted."""
        return tuple(sorted(id for attempt in self.exhausted for id in attempt.clients))

    @property
    def results(self) -> tuple[ClientResult, ...]:
        """In the order of client ids."""
        return tuple(self._results[id] for id in sorted(self._results))

    def states(self) -> dict[ClientId, StateRef]:
        """Return where the clients' next states are, in completion order."""
        return {id: result.state for id, result in self._results.items() if result.state is not None}

    def updates(self) -> list[Uploaded[Any]]:
        """Return what is aggregated: each client's update in the order of client ids, or each tier's mean in the order
        of the tiers' names."""
        if not self._means:
            return [Update(result.client, result.num_examples, result.payload) for result in self.results]
        means: list[Uploaded[Any]] = []
        for tier in sorted(self._means):
            mine = [result for result in self.results if result.client.tier == tier]
            mean = self._means[tier].total()
            assert mean is not None
            assert mean.leaves == len(mine), "every client's update is in the mean once"
            payload = with_arrays(self._structures[tier], iter(mean.arrays))
            num_examples = sum(result.num_examples for result in mine)
            means.append(TierMean(tier, mine[0].client.capacity, num_examples, len(mine), payload))
        return means


class Federation:
    """One method on one population of clients.

    Its state is `server_round`, `server` and `client_states`, and nothing else.

    Args:
        name: the method's name in the experiment.
        train, up_bytes: by tier, how a client trains with this method and how many bytes it sends.
        measure_server: whether one client of a measured round evaluates the server's model on the common test set.

    Attributes:
        server_round: number of finished rounds.
        server: the method's server state.
        client_states: where the states of the clients that have trained are, by client id.
    """

    def __init__(
        self,
        config: Config,
        name: str,
        method: AnyMethod,
        clients: Sequence[Client],
        initial: Initial,
        pool: Pool,
        train: Mapping[str, TrainConfig],
        up_bytes: Mapping[str, int],
        measure_server: bool = False,
    ):
        self.config, self.name, self.method, self.clients, self.pool = config, name, method, tuple(clients), pool
        self.train, self.up_bytes, self.measure_server = train, up_bytes, measure_server
        self.server_round = 0
        self.server = method.init_server(initial, self.clients)
        self.client_states: dict[ClientId, StateRef] = {}

    def restore(self, server_round: int, server: Any, client_states: Mapping[ClientId, StateRef]) -> None:
        """Continue from the state after some rounds."""
        self.server_round, self.server, self.client_states = server_round, server, dict(client_states)

    def round(self) -> Round:
        """Run the next round.

        Raises:
            FedrayError: the attempts at a client's task are exhausted and `clients.on_failure` ends the run, or too few
                clients finished.
        """
        started = perf_counter()
        cohort = sample_cohort(self.clients, self.config, self.server_round)
        downlinks = self._downlinks(cohort)
        measure = self.config.evaluation.every > 0 and self.server_round % self.config.evaluation.every == 0
        participation = self._select(cohort, downlinks)
        collected = yield from self._train(self.tasks(participation.participants, downlinks, measure, "state"))
        self.server, metrics = self.method.aggregate_train(self.server, collected.updates())
        states = collected.states()
        replaced = tuple(self.client_states[id] for id in states if id in self.client_states)
        self.client_states |= states
        self.server_round += 1
        return RoundResult(
            self.server_round - 1,
            collected.results,
            metrics,
            perf_counter() - started,
            participation,
            collected.left_out,
            replaced,
        )

    def final_pass(self) -> Round:
        """Run the final pass over all clients: download, evaluate (`aggregated`), and unless `evaluation.final` leaves
        it out, train once more and evaluate (`personalised`). Nothing is sent up, and neither the server's nor a
        client's state changes.

        Raises:
            FedrayError: as `round`.
        """
        started = perf_counter()
        downlinks = self._downlinks(self.clients)
        collected = yield from self._train(self.tasks(self.clients, downlinks, True, "adapter"))
        results = tuple(result._replace(uplink_bytes=0) for result in collected.results)
        seconds = perf_counter() - started
        return RoundResult(self.server_round, results, {}, seconds, left_out=collected.left_out, final=True)

    def states(self) -> Iterator[tuple[str, Any]]:
        """Yield each trained client's state as "client/ID", in the order of ids, one in memory at a time; then the
        server's as "server"."""
        for id in sorted(self.client_states):
            (state,) = self.pool.fetch([self.client_states[id]])
            yield f"client/{id}", state
        yield "server", self.server

    def tasks(
        self, clients: Sequence[Client], downlinks: Mapping[ClientId, Downlink], measure: bool, keep: Keep
    ) -> list[ClientTask]:
        """Return the tasks of a round, the largest clients first, so that a round does not wait for one that began
        last."""
        ordered = sorted(clients, key=lambda client: (-client.num_examples, client.id))
        positions: Counter[str] = Counter()
        # The server's model is evaluated by a client that holds all of it, if there is one.
        most = max((self.up_bytes.get(client.tier, 0) for client in clients), default=0)
        holders = [client.id for client in clients if self.up_bytes.get(client.tier, 0) == most]
        chosen = min(holders, default=None) if measure and self.measure_server else None
        tasks = []
        for client in ordered:
            position, state = positions[client.tier], self.client_states.get(client.id)
            at = self.server_round, downlinks[client.id], measure, keep, position, state
            tasks.append(ClientTask(client, *at, measure_server=client.id == chosen))
            positions[client.tier] += 1
        return tasks

    def _downlinks(self, cohort: Sequence[Client]) -> Mapping[ClientId, Downlink]:
        """Return what the clients receive.

        Raises:
            FedrayError: the method changes the server's state in doing so; this is checked before the first round. The
                state may be written to a checkpoint later, and a continued run would change it twice.
        """
        before = sha256([("server", self.server)]) if self.server_round == 0 else ""
        downlinks = downlinks_of(self.method.configure_train(self.server, cohort), cohort)
        if before and before != sha256([("server", self.server)]):
            raise FedrayError(
                f"{self.name}: configure_train changes the server's state; only aggregate_train may return a new one"
            )
        return downlinks

    def _select(self, cohort: Sequence[Client], downlinks: Mapping[ClientId, Downlink]) -> Participation:
        return select_participants(
            self.config.clients,
            self.config.seed,
            self.server_round,
            cohort,
            len(self.clients),
            self.train,
            {client.id: downlinks[client.id].num_bytes for client in cohort},
            self.up_bytes,
        )

    def _train(self, tasks: Sequence[ClientTask]) -> Generator[TasksFinished | TaskFailed | None, None, Collected]:
        """Yield finished and failed tasks; return what the clients brought."""
        collected, clients = Collected(), self.config.clients
        for found in self.pool.train(tasks):
            if found is None:
                yield None
            elif isinstance(found, ResultBatch):
                collected.add(found)
                ids = tuple(result.client.id for result in found.results)
                yield TasksFinished(self.name, self.server_round, ids)
            elif not found.exhausted:
                yield TaskFailed(self.name, found)
            elif found.kind == "update rejected" or clients.on_failure == "drop":
                yield TaskFailed(self.name, replace(found, action="left out"))
                collected.exhausted.append(found)
            else:
                yield TaskFailed(self.name, replace(found, action="run ended"))
                raise found.error()
        if clients.update_checks.compare:
            payloads = {result.client.id: result.payload for result in collected.results}
            for id, cause in outliers(payloads, clients.update_checks).items():
                attempt = FailedAttempt(self.server_round, (id,), 1, "", "update rejected", cause, exhausted=True)
                yield TaskFailed(self.name, replace(attempt, action="left out"))
                collected.reject(attempt)
        if collected.exhausted and len(collected.results) < clients.min_clients:
            raise too_few(self.server_round, len(collected.results), clients.min_clients, collected.exhausted)
        return collected


def sample_cohort(clients: Sequence[Client], config: Config, server_round: int) -> list[Client]:
    """Return the round's cohort in the order of client ids, drawn without replacement by (seed, round)."""
    size = cohort_size(config.clients, len(clients))
    chosen = keyed_rng(config.seed, "cohort", server_round).choice(len(clients), size=size, replace=False)
    return [clients[index] for index in np.sort(chosen)]
