"""ClientPool: the cohort on client actors; references in, references out.

An actor that dies is replaced, and its client is run again elsewhere from the round's inputs, at most
`clients.max_failures` times. An exception in a client's own code is not the machine's fault and ends the run.
"""

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from fedray.client import ClientActor
from fedray.config import ClientsConfig
from fedray.data.shards import Shard
from fedray.errors import ClientFailure, ConfigError, FedrayError
from fedray.methods.protocol import Initial
from fedray.types import ClientId
from fedray.worker import Assignment, Job, Outcome

START_TIMEOUT_S = 120.0
"""How long to wait for actors to start; those that the cluster has no room for until then are given up."""


class ClientPool:
    """Client actors of one kind. Make it inside the driver actor, so that it dies with the driver.

    shards: every client's shard; put into the object store once.
    cohort: the most clients that can be trained at a time; more actors would idle.

    Raises:
        ConfigError: the cluster has no room for one client actor.
    """

    def __init__(self, clients: ClientsConfig, shards: Mapping[ClientId, Shard], cohort: int):
        self._clients = clients
        self._shards = {id: ray.put(shard) for id, shard in shards.items()}
        self._job: Any = None
        size = self._size(cohort)
        gpus = _cluster().get("GPU", 0.0)
        self._num_gpus = clients.num_gpus if clients.num_gpus is not None else int(1e4 * gpus / size) / 1e4
        self._actors = self._start_together(size)

    def setup(self, job: Job) -> Initial:
        """Make every actor ready for a method and return the common starting point, drawn by the first."""
        self._job = ray.put(job)
        ready = [actor.setup.remote(self._job) for actor in self._actors]
        for actor, ref in zip(list(self._actors), ready, strict=True):
            try:
                self._get(ref)
            except RayActorError:
                self._replace(actor)
        initial: Initial = self._get(self._actors[0].initial.remote())
        return initial

    def train(
        self, assignments: Sequence[Assignment], downlinks: Mapping[ClientId, Any], states: Mapping[ClientId, Any]
    ) -> Iterator[tuple[Outcome, Any]]:
        """Yield each client's outcome and the reference of its next state, in completion order.

        Raises:
            ClientFailure: a client's actor died more often than `max_failures` allows.
        """
        payloads = {id(payload): ray.put(payload) for payload in downlinks.values()}  # equal payloads are one object
        waiting = deque(assignments)
        idle = list(self._actors)
        running: dict[Any, tuple[Any, Assignment, Any]] = {}
        failures: Counter[ClientId] = Counter()
        while waiting or running:
            while waiting and idle:
                actor, assignment = idle.pop(), waiting.popleft()
                name = assignment.client.id
                downlink = payloads[id(downlinks[name])]
                outcome, state = actor.train.remote(assignment, downlink, states.get(name), self._shards[name])
                running[outcome] = (actor, assignment, state)
            (finished,), _ = ray.wait(list(running), num_returns=1)
            actor, assignment, state = running.pop(finished)
            try:
                result: Outcome = self._get(finished)
            except RayActorError as error:
                failures[assignment.client.id] += 1
                if failures[assignment.client.id] > self._clients.max_failures:
                    raise ClientFailure(
                        f"client {assignment.client.id!r}: its actor died {failures[assignment.client.id]} times in "
                        f"round {assignment.server_round} (clients.max_failures={self._clients.max_failures}): {error}"
                    ) from None
                waiting.appendleft(assignment)
                idle.append(self._replace(actor))
                continue
            idle.append(actor)
            yield result, state

    def fetch(self, handle: Any) -> Any:
        """Return the state behind a reference."""
        return ray.get(handle)

    def close(self) -> None:
        """End the actors."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    def _size(self, cohort: int) -> int:
        if self._clients.actors:
            return self._clients.actors
        resources = _cluster()
        room = resources.get("CPU", 0) / self._clients.num_cpus
        if self._clients.num_gpus:
            room = min(room, resources.get("GPU", 0) / self._clients.num_gpus)
        return max(1, min(int(room + 1e-9), cohort))

    def _start_together(self, size: int) -> list[Any]:
        actors = [self._start() for _ in range(size)]
        up = [actor.__ray_ready__.remote() for actor in actors]
        done, _ = ray.wait(up, num_returns=size, timeout=START_TIMEOUT_S)
        for actor, ref in zip(actors, up, strict=True):
            if ref not in done:
                ray.kill(actor)
        if not done:
            raise ConfigError(
                f"clients: no client actor could start in {START_TIMEOUT_S:.0f} s; each asks for num_cpus="
                f"{self._clients.num_cpus:g} and num_gpus={self._num_gpus:g}, the cluster has {_readable(_cluster())}"
            )
        return [actor for actor, ref in zip(actors, up, strict=True) if ref in done]

    def _start(self) -> Any:
        return ClientActor.options(  # type: ignore[attr-defined]
            num_cpus=self._clients.num_cpus, num_gpus=self._num_gpus
        ).remote()

    def _replace(self, dead: Any) -> Any:
        """Return a new actor that is ready for the method. The old one is ended: it may only have been out of reach."""
        ray.kill(dead)
        actor = self._start()
        self._actors = [actor if other is dead else other for other in self._actors]
        self._get(actor.setup.remote(self._job))
        return actor

    def _get(self, refs: Any) -> Any:
        """ray.get, with fedray's own errors as themselves and not wrapped in Ray's."""
        try:
            return ray.get(refs)
        except RayTaskError as error:
            if isinstance(error.cause, FedrayError):
                raise error.cause from None
            raise


def _cluster() -> dict[str, float]:
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return resources


def _readable(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in sorted(resources.items()) if name in ("CPU", "GPU"))
