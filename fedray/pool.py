"""ClientPool: the cohort on client actors; references in, references out.

An actor that dies is replaced, and its client is run again elsewhere from the round's inputs, at most
`clients.max_failures` times. An exception in a client's own code is not the machine's fault and ends the run.
"""

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import ray
import ray._private.state
from ray.exceptions import RayActorError, RayTaskError

from fedray.client import ClientActor
from fedray.config import ClientsConfig
from fedray.data.shards import Shard
from fedray.errors import ClientFailure, ConfigError, FedrayError
from fedray.methods.protocol import Initial
from fedray.packing import Amounts, allot_with_gpus, fit_together, fits, requests
from fedray.training.metering import MemoryUse
from fedray.types import ClientId
from fedray.worker import Assignment, Job, Outcome

START_TIMEOUT_S = 120.0
"""How long to wait for actors to start; those that the cluster has no room for until then are given up."""


class ClientPool:
    """Client actors, some for each tier. Make it inside the driver actor, so that it dies with the driver.

    shards: every client's shard; put into the object store once.
    cohorts: for each tier that has clients, the most that can be trained at a time; more actors would idle.

    Raises:
        ConfigError: the cluster has no room for one client actor of every tier.
    """

    def __init__(self, clients: ClientsConfig, shards: Mapping[ClientId, Shard], cohorts: Mapping[str, int]):
        self._max_failures = clients.max_failures
        self._shards = {id: ray.put(shard) for id, shard in shards.items()}
        self._jobs: dict[str, Any] = {}
        nodes = living_nodes()
        asked = requests(clients, list(cohorts), nodes)
        elastic = bool(_node_types())
        _check_room(asked, nodes)
        fixed = {tier: clients.tier(tier).actors for tier in cohorts}
        sharing = [tier for tier in cohorts if clients.tier(tier).num_gpus is None]
        sizes, self._asked = allot_with_gpus(asked, cohorts, fixed, nodes, sharing, elastic)
        self._actors = self._start_together(sizes)

    def setup(self, jobs: Mapping[str, Job]) -> Initial:
        """Make every actor ready for a method and return the common starting point, drawn by one of them.

        jobs: the method's job on each tier.
        """
        self._jobs = {tier: ray.put(job) for tier, job in jobs.items()}
        ready = [
            (tier, actor, actor.setup.remote(self._jobs[tier]))
            for tier, actors in self._actors.items()
            for actor in actors
        ]
        for tier, actor, ref in ready:
            try:
                self._get(ref)
            except RayActorError:
                self._replace(tier, actor)
        initial: Initial = self._get(next(iter(self._actors.values()))[0].initial.remote())
        return initial

    def train(
        self, assignments: Sequence[Assignment], downlinks: Mapping[ClientId, Any], states: Mapping[ClientId, Any]
    ) -> Iterator[tuple[Outcome, Any]]:
        """Yield each client's outcome and the reference of its next state, in completion order.

        Raises:
            ClientFailure: a client's actor died more often than `max_failures` allows.
        """
        payloads = {id(payload): ray.put(payload) for payload in downlinks.values()}  # equal payloads are one object
        waiting: dict[str, deque[Assignment]] = {tier: deque() for tier in self._actors}
        for assignment in assignments:
            waiting[assignment.client.tier].append(assignment)
        idle = {tier: list(actors) for tier, actors in self._actors.items()}
        running: dict[Any, tuple[Any, Assignment, Any]] = {}
        failures: Counter[ClientId] = Counter()
        while running or any(waiting.values()):
            ready = [name for name in waiting for _ in range(min(len(waiting[name]), len(idle[name])))]
            for tier in ready:
                actor, assignment = idle[tier].pop(), waiting[tier].popleft()
                name = assignment.client.id
                downlink = payloads[id(downlinks[name])]
                outcome, state = actor.train.remote(assignment, downlink, states.get(name), self._shards[name])
                running[outcome] = (actor, assignment, state)
            (finished,), _ = ray.wait(list(running), num_returns=1)
            actor, assignment, state = running.pop(finished)
            tier = assignment.client.tier
            try:
                result: Outcome = self._get(finished)
            except RayActorError as error:
                failures[assignment.client.id] += 1
                if failures[assignment.client.id] > self._max_failures:
                    raise ClientFailure(
                        f"client {assignment.client.id!r}: its actor died {failures[assignment.client.id]} times in "
                        f"round {assignment.server_round} (clients.max_failures={self._max_failures}): {error}"
                    ) from None
                waiting[tier].appendleft(assignment)
                idle[tier].append(self._replace(tier, actor))
                continue
            idle[tier].append(actor)
            yield result, state

    def fetch(self, handle: Any) -> Any:
        """Return the state behind a reference."""
        return ray.get(handle)

    def memory(self) -> dict[str, list[MemoryUse]]:
        """Return what each actor has taken at most since `setup`, by tier; one that died just now is left out."""
        uses: dict[str, list[MemoryUse]] = {tier: [] for tier in self._actors}
        asked = [(tier, actor.memory.remote()) for tier, actors in self._actors.items() for actor in actors]
        for tier, ref in asked:
            with suppress(RayActorError):
                uses[tier].append(self._get(ref))
        return uses

    def close(self) -> None:
        """End the actors."""
        for actors in self._actors.values():
            for actor in actors:
                ray.kill(actor)
        self._actors = {}

    def _start_together(self, sizes: Mapping[str, int]) -> dict[str, list[Any]]:
        started = [(tier, self._start(tier)) for tier, size in sizes.items() for _ in range(size)]
        up = [actor.__ray_ready__.remote() for _, actor in started]
        done, _ = ray.wait(up, num_returns=len(up), timeout=START_TIMEOUT_S)
        actors: dict[str, list[Any]] = {tier: [] for tier in sizes}
        for (tier, actor), ref in zip(started, up, strict=True):
            if ref in done:
                actors[tier].append(actor)
            else:
                ray.kill(actor)
        for tier, ready in actors.items():
            if not ready:
                for actor in (actor for others in actors.values() for actor in others):
                    ray.kill(actor)
                raise ConfigError(
                    f"clients: no client actor of tier {tier!r} could start in {START_TIMEOUT_S:.0f} s; each asks for "
                    f"{_readable(self._asked[tier])}, the cluster has {_readable(_total(living_nodes()))}"
                )
        return actors

    def _start(self, tier: str) -> Any:
        asked = dict(self._asked[tier])
        cpus, gpus, memory = asked.pop("CPU"), asked.pop("GPU"), asked.pop("memory")
        return ClientActor.options(  # type: ignore[attr-defined]
            num_cpus=cpus, num_gpus=gpus, memory=int(memory) or None, resources=asked or None
        ).remote(gpus)

    def _replace(self, tier: str, dead: Any) -> Any:
        """Return a new actor that is ready for the method. The old one is ended: it may only have been out of reach."""
        ray.kill(dead)
        actor = self._start(tier)
        self._actors[tier] = [actor if other is dead else other for other in self._actors[tier]]
        self._get(actor.setup.remote(self._jobs[tier]))
        return actor

    def _get(self, refs: Any) -> Any:
        """ray.get, with fedray's own errors as themselves and not wrapped in Ray's."""
        try:
            return ray.get(refs)
        except RayTaskError as error:
            if isinstance(error.cause, FedrayError):
                raise error.cause from None
            raise


def living_nodes() -> list[dict[str, float]]:
    """Return what each living node has in all."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def _node_types() -> dict[str, dict[str, float]]:
    """Return what the autoscaler can add, by name of the node type; empty where there is no autoscaler."""
    config = ray._private.state.state.get_cluster_config()
    groups = [] if config is None else config.node_group_configs
    return {group.name: dict(group.resources) for group in groups if group.max_count != 0}


def _check_room(asked: Mapping[str, Amounts], nodes: Sequence[Amounts]) -> None:
    """Say at once what can never start.

    Raises:
        ConfigError: an actor that fits on no node, or tiers that do not fit together; the autoscaler's nodes count.
    """
    types = _node_types()
    for tier, amounts in asked.items():
        if not any(fits(amounts, node) for node in (*nodes, *types.values())):
            raise ConfigError(
                f"clients: an actor of tier {tier!r} fits on no node: it asks for {_readable(amounts)}; the cluster's "
                f"nodes have {'; '.join(sorted({_readable(node) for node in nodes}))}"
                + "".join(f"; node type {name} has {_readable(node)}" for name, node in types.items())
            )
    if not types and not fit_together(asked, nodes):
        wanted = "; ".join(f"{tier}: {_readable(amounts)}" for tier, amounts in asked.items())
        raise ConfigError(
            f"clients.tiers: one actor of every tier ({wanted}) does not fit into the cluster at a time, which has "
            f"{_readable(_total(nodes))}; lower num_cpus or num_gpus (they may be fractions)"
        )


def _total(nodes: Sequence[Amounts]) -> Amounts:
    total: Counter[str] = Counter()
    for node in nodes:
        total.update(node)
    return total


def _readable(amounts: Amounts) -> str:
    """Return `2 CPU, 0.5 GPU`; Ray's own bookkeeping resources are left out."""
    names = [name for name in ("CPU", "GPU", *sorted(amounts)) if amounts.get(name)]
    shown = {name: f"{amounts[name]:g} {name}" for name in names if ":" not in name and "store" not in name}
    if "memory" in shown:
        shown["memory"] = f"{amounts['memory'] / 1e9:.3g} GB memory"
    return ", ".join(shown.values()) or "nothing"
