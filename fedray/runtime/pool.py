"""ClientPool: the cohort on client actors.

Whatever keeps a client from finishing (an exception, its actor's death, a lost object, no progress for too long), the
client is run again from the round's inputs, elsewhere if there is an elsewhere, at most `clients.max_failures` times.
An actor that died is replaced; until the new one is ready the others go on.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic, perf_counter
from typing import Any

from ray.exceptions import ObjectLostError, OutOfMemoryError, RayError, RayTaskError

from fedray.config import ClientsConfig
from fedray.data.shards import Shard
from fedray.errors import ConfigError, FedrayError
from fedray.federation.failures import FailedAttempt, Kind, TaskFailure
from fedray.federation.result_batches import BATCH_SECONDS, ResultBatch, failure_of, state_files
from fedray.federation.work_queue import TaskGroup, WorkQueue, ids_of, task_groups, work_of
from fedray.federation.worker import ClientTask, WorkerSetup
from fedray.methods.protocol import Initial
from fedray.planning.placement import allot_shared, allot_with_gpus, requests
from fedray.runtime.actor_group import LOOK_S, ActorGroup, ActorHandle, ActorSource, first_line
from fedray.runtime.cluster import check_room, has_autoscaler, living_nodes
from fedray.runtime.messages import ObjectSlot, Turn, get, next_result_batch, put_downlinks, put_shards, task_batch
from fedray.storage.client_states import StateFiles, StateRef
from fedray.training.metering import MemoryUse
from fedray.types import ClientId

NODES_EVERY_S = 5.0
"""How often to look for new nodes."""

MOST_ASKED = 100
"""Actors of a tier that an autoscaler is asked for, where `clients.actors` does not say."""

IDLE_S = 60.0
"""Where there is an autoscaler, actors that have waited for others for so long are let go until the next round."""

HANDLING_SHARE = 0.02
MAX_BATCH_SECONDS = 1.0
"""ResultBatcher last so long that taking them is this part of the time; but a death shall not lose more than a
second."""

SMOOTHING = 0.1
"""Weight of the latest block in the moving average of the seconds that handling one takes."""


class ClientPool:
    """Client actors, some for each tier. Make it inside the driver actor, so that it dies with the driver.

    shards: every client's shard; put into the object store once.
    cohorts: for each tier that has clients, the most that can be trained at a time; more actors would idle.
    source: where actors come from; default: they are the pool's own. sharers: how many such pools share the cluster.

    It has as many actors as the cohort can use and the nodes have room for, and grows when nodes join. Where there is
    an autoscaler, it asks for all that the cohort can use, begins when every tier has one, and lets those go that idle.

    Raises:
        ConfigError: the cluster has no room for one client actor of every tier.
    """

    def __init__(
        self,
        clients: ClientsConfig,
        shards: Mapping[ClientId, Shard],
        cohorts: Mapping[str, int],
        source: ActorSource | None = None,
        sharers: int = 1,
    ):
        self._max_failures, self._timeout = clients.max_failures, clients.client_timeout_s
        self._widths: dict[str, int] = {}
        self._shards = put_shards(shards)
        self._files: StateFiles | None = None
        self._paces: dict[str, _Pace] = {}
        self._handling = 0.0  # seconds in which a block is taken and made use of, a moving average
        self._clients, self._cohorts, self._sharers = clients, cohorts, sharers
        self._workers = {tier: clients.tier(tier).workers for tier in cohorts}
        self._elastic = has_autoscaler()
        nodes, fixed = living_nodes(), self._fixed()
        self._num_nodes, self._looked_at_nodes = len(nodes), monotonic()
        asked = requests(clients, list(cohorts), nodes)
        if not self._elastic:
            check_room(asked, nodes, self._workers)
        sharing = [tier for tier in cohorts if clients.tier(tier).num_gpus is None and self._workers[tier] == 1]
        self._sizes, self._asked = allot_with_gpus(asked, cohorts, fixed, nodes, sharing, self._workers)
        if self._elastic:
            self._sizes = {tier: fixed[tier] or min(most // sharers + 1, MOST_ASKED) for tier, most in cohorts.items()}
        elif sharers > 1:
            self._sizes = allot_shared(self._asked, cohorts, fixed, nodes, sharers, self._workers)
        self.crew = ActorGroup(clients, self._sizes, self._asked, self._elastic, source)

    def setup(self, jobs: Mapping[str, WorkerSetup]) -> Initial:
        """Make every actor ready for a method and return the common starting point, drawn by one of them.

        jobs: the method's job on each tier.
        """
        self._paces = {tier: _Pace() for tier in jobs}
        self._files = state_files(next(iter(jobs.values())))
        self._widths = {tier: job.config.clients.tier(tier).fuse_width for tier, job in jobs.items()}
        self.crew.setup(jobs)
        initial: Initial = get(next(iter(self.crew.members.values()))[0].handle.initial.remote())
        return initial

    def train(
        self, assignments: Sequence[ClientTask], downlinks: Mapping[ClientId, Any], states: Mapping[ClientId, StateRef]
    ) -> Iterator[ResultBatch | FailedAttempt]:
        """Yield clients in completion order, and attempts that came to nothing.

        Raises:
            FedrayError: a tier has no actor left and gets none.
        """
        sent = put_downlinks({client: downlinks[client] for client in (entry.client.id for entry in assignments)})
        by_tier = task_groups(assignments, self._widths)
        waiting = {tier: WorkQueue(entries, self._max_failures) for tier, entries in by_tier.items()}
        self.crew.grow(self._sizes)  # again, where some were let go
        idle = {tier: list(members) for tier, members in self.crew.members.items()}
        running: dict[Any, _Running] = {}
        try:
            yield from self._serve(waiting, idle, running, sent, states)
        finally:
            for serving in running.values():  # an exception, or whoever asked lost interest: they still work
                self.crew.release(serving.member)

    def _serve(
        self,
        waiting: "Mapping[str, WorkQueue]",
        idle: dict[str, list[ActorHandle]],
        running: "dict[Any, _Running]",
        sent: Mapping[ClientId, ObjectSlot],
        states: Mapping[ClientId, StateRef],
    ) -> Iterator[ResultBatch | FailedAttempt]:
        """Hand out chunks until nobody waits, and yield what comes back."""
        looked = monotonic()
        rested = dict.fromkeys(idle, looked)  # since when a tier's idle actors have had nothing to do
        while running or any(waiting.values()):
            for tier, chunks in waiting.items():
                for member in list(idle[tier]) if chunks else ():
                    lasting = self._block_seconds()
                    worthwhile = self._paces[tier].work_in(lasting)
                    if chunk := chunks.take(self.actors(tier), worthwhile, member):
                        idle[tier].remove(member)
                        turns = [self._turns(group, sent, states) for group in chunk]
                        stream = member.handle.train.remote(task_batch(turns, lasting))
                        running[stream] = _Running(member, chunk)
            ready = self.crew.wait(list(running))
            if monotonic() - looked > LOOK_S:
                looked = monotonic()
                for stream in self._stuck(running):
                    late = f"no progress for {self._timeout:g} s (clients.client_timeout_s)"
                    yield from self._lost(running.pop(stream), waiting, "timeout", late)
                self._grow_into_new_nodes()
                for tier, members in idle.items():
                    if waiting.get(tier) or not members:
                        rested[tier] = looked
                    elif self._elastic and looked - rested[tier] > IDLE_S:
                        self._let_go(tier, members)
                continue
            if not ready:
                continue
            (stream,) = ready
            if stream not in running:
                if (new := self.crew.started(stream)) is not None:
                    idle[new.tier].append(new)
                continue
            started = perf_counter()
            serving = running[stream]
            try:
                block = next_result_batch(stream)
            except ConfigError:
                raise
            except (RayError, FedrayError) as error:  # the actor died, or its node with the block, or the call
                yield from self._lost(running.pop(stream), waiting, *_cause(error))
                continue
            serving.served(block)
            self._paces[serving.member.tier].add(block)
            if block.last:
                del running[stream]
                idle[serving.member.tier].append(serving.member)
            if block.outcomes:
                yield block
            for failure in block.failures:
                yield waiting[serving.member.tier].take_back(
                    failure, serving.chunk, serving.member, serving.member.node
                )
            self._handling += SMOOTHING * (perf_counter() - started - self._handling)

    def actors(self, tier: str) -> int:
        """Return how many actors serve the tier."""
        return len(self.crew.members[tier])

    def width_seconds(self, assignments: Sequence[ClientTask], downlinks: Mapping[ClientId, Any]) -> dict[int, float]:
        """See `Worker.width_seconds`; one of the actors of the assignments' tier is asked."""
        actor = self.crew.members[assignments[0].client.tier][0].handle
        turns = self._turns(assignments, put_downlinks(downlinks), {})
        found: dict[int, float] = get(actor.width_seconds.remote(task_batch([turns])))
        return found

    def fetch(self, refs: Sequence[StateRef]) -> list[Any]:
        """Return the states."""
        return [] if self._files is None else self._files.read(refs)

    def forget(self, refs: Sequence[StateRef]) -> None:
        """Delete states that nobody needs any more."""
        if self._files is not None:
            self._files.forget(refs)

    def memory(self) -> dict[str, list[MemoryUse]]:
        """Return what each actor has taken at most since `setup`, by tier; one that died just now is left out."""
        uses: dict[str, list[MemoryUse]] = {tier: [] for tier in self.crew.members}
        asked = [
            (member.tier, member.handle.memory.remote()) for members in self.crew.members.values() for member in members
        ]
        for tier, ref in asked:
            with suppress(RayError):
                uses[tier].append(get(ref))
        return uses

    def close(self) -> None:
        """End the actors."""
        self.crew.close()

    def _fixed(self) -> dict[str, int | None]:
        return {tier: self._clients.tier(tier).actors for tier in self._cohorts}

    def _grow_into_new_nodes(self) -> None:
        """Start more actors if nodes have joined; where there is an autoscaler they are asked for already."""
        if self._elastic or monotonic() - self._looked_at_nodes < NODES_EVERY_S:
            return
        self._looked_at_nodes = monotonic()
        nodes = living_nodes()
        if len(nodes) > self._num_nodes:
            self._sizes = allot_shared(self._asked, self._cohorts, self._fixed(), nodes, self._sharers, self._workers)
            self.crew.grow(self._sizes)
        self._num_nodes = len(nodes)

    def _let_go(self, tier: str, idle: list[ActorHandle]) -> None:
        """End a tier's actors that have nothing to do, but one: their nodes may go away."""
        while idle and self.actors(tier) > 1:
            self.crew.release(idle.pop())

    def _block_seconds(self) -> float:
        """At least as long as it takes to handle a block of everybody: more actors never send more than can be taken.
        And so long that handling takes only HANDLING_SHARE of the time, up to MAX_BATCH_SECONDS: large updates are
        then averaged where they arise before they travel."""
        everybody = self._handling * sum(map(len, self.crew.members.values()))
        return max(BATCH_SECONDS, everybody, min(MAX_BATCH_SECONDS, everybody / HANDLING_SHARE))

    def _turns(
        self, group: Sequence[ClientTask], sent: Mapping[ClientId, ObjectSlot], states: Mapping[ClientId, StateRef]
    ) -> list[Turn]:
        ids = [assignment.client.id for assignment in group]
        return [Turn(entry, sent[id], states.get(id), self._shards[id]) for entry, id in zip(group, ids, strict=True)]

    def _stuck(self, running: "Mapping[Any, _Running]") -> list[Any]:
        """Return the streams of which nothing has come for too long."""
        if self._timeout is None:
            return []
        return [stream for stream, serving in running.items() if monotonic() - serving.heard > self._timeout]

    def _lost(
        self,
        serving: "_Running",
        waiting: Mapping[str, WorkQueue],
        kind: Kind,
        cause: str,
        failure: TaskFailure | None = None,
    ) -> Iterator[FailedAttempt]:
        """Hand out again what an actor had not finished, and replace it."""
        member, chunks = serving.member, waiting[serving.member.tier]
        self.crew.replace(member, cause)
        if not (left := serving.left):
            return
        ids = tuple(id for group in left for id in ids_of(group))
        number, exhausted = 1, False
        non_retryable = failure is not None and failure.non_retryable
        if len(serving.chunk) == 1:
            number, exhausted = chunks.failed(left[0], member, non_retryable)
        else:
            chunks.unserved(left)
        trace = "" if failure is None else failure.trace
        yield FailedAttempt(
            left[0][0].server_round,
            ids,
            number,
            member.node,
            kind,
            cause,
            exhausted,
            exhausted and non_retryable,
            trace,
        )


def _cause(error: Exception) -> tuple[Kind, str, TaskFailure | None]:
    """Return what ended a stream: its kind, one line, and what an exception in the actor says."""
    if isinstance(error, FedrayError):
        failure = failure_of((), error)
        return "exception", failure.cause, failure
    if isinstance(error, RayTaskError):
        cause = error.cause if isinstance(error.cause, Exception) else error
        return "exception", f"{type(cause).__name__}: {first_line(cause)}", TaskFailure((), "", trace=str(error))
    if isinstance(error, OutOfMemoryError) or "OUT_OF_MEMORY" in str(error):  # Ray's memory monitor ended it
        return "out of memory", first_line(error), None
    if isinstance(error, ObjectLostError):
        return "lost object", first_line(error), None
    return "actor died", first_line(error), None


@dataclass
class _Pace:
    """How fast a tier's actors have been with this method."""

    seconds: float = 0.0
    work: int = 0

    def add(self, block: ResultBatch) -> None:
        self.seconds += block.seconds
        self.work += sum(work_of(outcome.update.client) for outcome in block.outcomes)

    def work_in(self, seconds: float) -> float:
        """Return the work that an actor does in this time; 0 while nothing is known."""
        return seconds * self.work / self.seconds if self.seconds else 0.0


@dataclass
class _Running:
    """A chunk that an actor works on. finished: how many of its task_groups have come back, in their order. heard: when
    the last block came."""

    member: ActorHandle
    chunk: list[TaskGroup]
    finished: int = 0
    heard: float = field(default_factory=monotonic)

    def served(self, block: ResultBatch) -> None:
        self.finished += block.groups
        self.heard = monotonic()

    @property
    def left(self) -> list[TaskGroup]:
        return self.chunk[self.finished :]
