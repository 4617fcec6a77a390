"""ClientPool: trains the cohort on client actors.

If a client task fails (an exception, its actor's death, a lost object, no progress for too long), it is run again from
the round's inputs, on another actor if there is one, at most `clients.max_failures` times. An actor that died is
replaced; the others continue meanwhile.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from ray.exceptions import ObjectLostError, RayError, RayTaskError

from fedray.config import ClientsConfig
from fedray.data.shards import Shard
from fedray.errors import ConfigError, FedrayError, StorageError
from fedray.federation.failures import FailedAttempt, Kind, TaskFailure
from fedray.federation.result_batches import BATCH_SECONDS, ResultBatch, failure_of, state_files
from fedray.federation.tasks import ClientTask, Downlink, WorkerSetup
from fedray.federation.work_queue import TaskGroup, Throughput, WorkQueue, ids_of, task_groups
from fedray.methods.protocol import Initial
from fedray.runtime.actor_group import LOOK_S, ActorGroup, ActorHandle, ActorSource
from fedray.runtime.causes import first_line, lost_by, ran_out_of_memory
from fedray.runtime.cluster import check_room, has_autoscaler, living_nodes
from fedray.runtime.messages import get, next_result_batch, put_downlinks, put_shards, task_batch
from fedray.runtime.policies import Scaling
from fedray.storage.client_states import StateFiles, StateRef
from fedray.training.metering import MemoryUse
from fedray.types import ClientId

NODES_EVERY_S = 5.0
"""Seconds between checks for new nodes."""


class ClientPool:
    """Client actors, some for each tier. Create the pool inside the driver actor, so that it ends with the driver.

    The pool has as many actors as the cohort can use and the nodes have room for, and grows when nodes join. With an
    autoscaler it requests all actors that the cohort can use, begins when every tier has one, and releases idle ones.

    Args:
        shards: every client's shard; put into the object store once.
        cohorts: by tier, the most clients that a round can have; more actors would idle.
        source: where actors come from; by default they are the pool's own.
        num_pools: number of such pools that share the cluster.

    Raises:
        ConfigError: the cluster has no room for one client actor of every tier.
    """

    def __init__(
        self,
        clients: ClientsConfig,
        shards: Mapping[ClientId, Shard],
        cohorts: Mapping[str, int],
        source: ActorSource | None = None,
        num_pools: int = 1,
    ):
        self._max_failures, self._timeout = clients.max_failures, clients.client_timeout_s
        self._widths: dict[str, int] = {}
        self._throughput: dict[str, Throughput] = {}
        self._shards = put_shards(shards)
        self._files: StateFiles | None = None
        elastic, nodes = has_autoscaler(), living_nodes()
        self._scaling, self._looked_at_nodes = Scaling(clients, cohorts, nodes, elastic, num_pools), monotonic()
        if not elastic:
            check_room(self._scaling.requested, nodes, self._scaling.workers)
        self.group = ActorGroup(clients, self._scaling.sizes, self._scaling.resources, elastic, source)

    def setup(self, setups: Mapping[str, WorkerSetup]) -> Initial:
        """Make every actor ready for a method and return the common starting point, drawn by one of them.

        Args:
            setups: the method's, by tier.
        """
        self._files = state_files(next(iter(setups.values())))
        self._widths = {tier: setup.config.clients.tier(tier).fuse_width for tier, setup in setups.items()}
        self._throughput = {tier: Throughput() for tier in setups}
        self.group.setup(setups)
        initial: Initial = get(next(iter(self.group.handles.values()))[0].actor.initial.remote())
        return initial

    def train(self, tasks: Sequence[ClientTask]) -> Iterator[ResultBatch | FailedAttempt | None]:
        """Yield None once the first tasks run, then results in completion order, and failed attempts.

        Raises:
            FedrayError: a tier has lost all actors, and none could be started again.
        """
        queues = {
            tier: WorkQueue(groups, self._max_failures) for tier, groups in task_groups(tasks, self._widths).items()
        }
        self.group.grow(self._scaling.sizes)  # some may have been released
        running: dict[Any, _Running] = {}
        try:
            yield from self._serve(queues, put_downlinks(tasks), running)
        finally:
            for serving in running.values():  # after an exception, or if the caller stops, these still run
                self.group.release(serving.handle)

    def _serve(
        self, queues: Mapping[str, WorkQueue], downlinks: Mapping[int, Downlink], running: "dict[Any, _Running]"
    ) -> Iterator[ResultBatch | FailedAttempt | None]:
        """Hand out task batches until no task is left, and yield what comes back."""
        idle = {tier: list(handles) for tier, handles in self.group.handles.items()}
        looked, handed_out = monotonic(), False
        idle_since = dict.fromkeys(idle, looked)
        while running or any(queues.values()):
            for tier, queue in queues.items():
                for handle in list(idle[tier]) if queue else ():
                    least = self._throughput[tier].work_in(BATCH_SECONDS)
                    if batch := queue.next_batch(self.actors(tier), handle, least, len(idle[tier])):
                        idle[tier].remove(handle)
                        sent = task_batch(batch, downlinks, self._shards)
                        running[handle.actor.train.remote(sent)] = _Running(handle, batch)
            if not handed_out:
                handed_out = True
                yield None
                looked = monotonic()  # actors that worked meanwhile could not be heard
                for serving in running.values():
                    serving.last_heard = looked
            ready = self.group.wait(list(running))
            if monotonic() - looked > LOOK_S:
                looked = monotonic()
                for stream in self._stuck(running):
                    cause = f"no progress for {self._timeout:g} s (clients.client_timeout_s)"
                    yield from self._lost(running.pop(stream), queues, "timeout", cause)
                self._look_at_nodes()
                for tier, handles in idle.items():
                    if queues.get(tier) or not handles:
                        idle_since[tier] = looked
                    elif self._scaling.releases(looked - idle_since[tier]):
                        self._release_all_but_one(tier, handles)
                continue
            if not ready:
                continue
            (stream,) = ready
            if stream not in running:
                if (new := self.group.started(stream)) is not None:
                    idle[new.tier].append(new)
                continue
            serving = running[stream]
            try:
                results = next_result_batch(stream)
            except (ConfigError, StorageError):  # no other actor could do better
                raise
            except (RayError, FedrayError) as error:  # the actor died, or its node with the results, or the call failed
                yield from self._lost(running.pop(stream), queues, *_cause(error))
                continue
            serving.served(results)
            self._throughput[serving.handle.tier].record((result.client for result in results.results), results.seconds)
            if results.last:
                del running[stream]
                idle[serving.handle.tier].append(serving.handle)
            if results.results:
                yield results
            for failure in results.failures:
                queue = queues[serving.handle.tier]
                yield queue.fail(failure, serving.batch, serving.handle, serving.handle.location)

    def actors(self, tier: str) -> int:
        """Return how many actors serve the tier."""
        return len(self.group.handles[tier])

    def width_seconds(self, tasks: Sequence[ClientTask]) -> dict[int, float]:
        """See `Worker.width_seconds`; measured by one of the actors of the tasks' tier."""
        actor = self.group.handles[tasks[0].client.tier][0].actor
        sent = task_batch([tasks], put_downlinks(tasks), self._shards)
        found: dict[int, float] = get(actor.width_seconds.remote(sent))
        return found

    def gpu_memory(self, tier: str) -> int | None:
        """Return the bytes of a GPU that an actor of the tier may take; None if it requested no GPU, or finds none."""
        if not self._scaling.resources[tier].get("GPU"):
            return None
        found: int | None = get(self.group.handles[tier][0].actor.gpu_memory.remote())
        return found

    def fetch(self, refs: Sequence[StateRef]) -> list[Any]:
        """Return the states."""
        return [] if self._files is None else self._files.read(refs)

    def forget(self, refs: Sequence[StateRef]) -> None:
        """Delete states that are not needed any more."""
        if self._files is not None:
            self._files.forget(refs)

    def memory(self) -> dict[str, list[MemoryUse]]:
        """Return each actor's peak memory since `setup`, by tier; an actor that has just died is missing."""
        uses: dict[str, list[MemoryUse]] = {tier: [] for tier in self.group.handles}
        requested = [
            (handle.tier, handle.actor.memory.remote()) for handles in self.group.handles.values() for handle in handles
        ]
        for tier, ref in requested:
            with suppress(RayError):
                uses[tier].append(get(ref))
        return uses

    def close(self) -> None:
        """End the actors."""
        self.group.close()

    def _look_at_nodes(self) -> None:
        """Start more actors if nodes have joined."""
        if monotonic() - self._looked_at_nodes < NODES_EVERY_S:
            return
        self._looked_at_nodes = monotonic()
        if self._scaling.nodes_changed(living_nodes()):
            self.group.grow(self._scaling.sizes)

    def _release_all_but_one(self, tier: str, idle: list[ActorHandle]) -> None:
        while idle and self.actors(tier) > 1:
            self.group.release(idle.pop())

    def _stuck(self, running: "Mapping[Any, _Running]") -> list[Any]:
        """Return the streams without results for longer than the timeout."""
        if self._timeout is None:
            return []
        return [stream for stream, serving in running.items() if monotonic() - serving.last_heard > self._timeout]

    def _lost(
        self,
        serving: "_Running",
        queues: Mapping[str, WorkQueue],
        kind: Kind,
        cause: str,
        failure: TaskFailure | None = None,
    ) -> Iterator[FailedAttempt]:
        """Replace an actor, and put what it had not finished back into the queue."""
        handle, queue = serving.handle, queues[serving.handle.tier]
        self.group.replace(handle, cause)
        if not (unfinished := serving.unfinished):
            return
        ids = tuple(id for group in unfinished for id in ids_of(group))
        number, exhausted = 1, False
        non_retryable = failure is not None and failure.non_retryable
        if len(serving.batch) == 1:
            number, exhausted = queue.record_failure(unfinished[0], handle, non_retryable)
        else:
            queue.requeue(unfinished)
        yield FailedAttempt(
            unfinished[0][0].server_round,
            ids,
            number,
            handle.location,
            kind,
            cause,
            exhausted,
            exhausted and non_retryable,
            trace="" if failure is None else failure.trace,
        )


def _cause(error: Exception) -> tuple[Kind, str, TaskFailure | None]:
    """Return what ended a stream: its kind, one line about it, and the failure if the actor raised an exception."""
    if isinstance(error, FedrayError):
        failure = failure_of((), error)
        return "exception", failure.cause, failure
    if isinstance(error, RayTaskError):
        cause = error.cause if isinstance(error.cause, Exception) else error
        return "exception", f"{type(cause).__name__}: {first_line(cause)}", TaskFailure((), "", trace=str(error))
    if ran_out_of_memory(error):
        return "out of memory", lost_by(error), None
    if isinstance(error, ObjectLostError):
        return "lost object", first_line(error), None
    return "actor died", lost_by(error), None


@dataclass
class _Running:
    """A task batch that is running on an actor.

    Attributes:
        finished: number of groups whose results have arrived; they arrive in order.
        last_heard: time of the last results.
    """

    handle: ActorHandle
    batch: list[TaskGroup]
    finished: int = 0
    last_heard: float = field(default_factory=monotonic)

    def served(self, results: ResultBatch) -> None:
        self.finished += results.groups
        self.last_heard = monotonic()

    @property
    def unfinished(self) -> list[TaskGroup]:
        return self.batch[self.finished :]
