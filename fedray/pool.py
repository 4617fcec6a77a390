"""ClientPool: the cohort on client actors; references in, references out.

An actor that dies is replaced, and the clients that it had not finished are run again elsewhere from the round's
inputs, each at most `clients.max_failures` times. An exception in a client's own code is not the machine's fault and
ends the run.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray._private.state
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedray.chunks import Chunks
from fedray.client import ClientActor, Packed, Turn, build_extensions
from fedray.config import ClientsConfig
from fedray.data.shards import Shard
from fedray.errors import ConfigError, FedrayError
from fedray.methods.protocol import Initial
from fedray.packing import Amounts, allot_with_gpus, fit_together, fits, requests
from fedray.silo import start_silo
from fedray.state import num_bytes
from fedray.types import ClientId
from fedray.worker import Assignment, Job, Outcome

START_TIMEOUT_S = 120.0
"""How long to wait for actors to start; those that the cluster has no room for until then are given up."""


CLOSE_TIMEOUT_S = 10.0
"""How long silos may take to end in order; then they are killed."""


PACK_CLIENTS = 64
"""So many clients' shards are one object: an actor fetches it once, and maps what it holds."""

SMALL_BYTES = 100_000
"""Downlinks of fewer bytes are packed into one object."""


class ClientPool:
    """Client actors, some for each tier. Make it inside the driver actor, so that it dies with the driver.

    shards: every client's shard; put into the object store once.
    cohorts: for each tier that has clients, the most that can be trained at a time; more actors would idle.

    Raises:
        ConfigError: the cluster has no room for one client actor of every tier.
    """

    def __init__(self, clients: ClientsConfig, shards: Mapping[ClientId, Shard], cohorts: Mapping[str, int]):
        self._max_failures = clients.max_failures
        self._workers = {tier: clients.tier(tier).workers for tier in cohorts}
        self._shards = _pack_shards(shards)
        self._jobs: dict[str, Any] = {}
        nodes = _nodes()
        asked = requests(clients, list(cohorts), nodes)
        elastic = bool(_node_types())
        _check_room(asked, nodes, self._workers)
        fixed = {tier: clients.tier(tier).actors for tier in cohorts}
        sharing = [tier for tier in cohorts if clients.tier(tier).num_gpus is None and self._workers[tier] == 1]
        sizes, self._asked = allot_with_gpus(asked, cohorts, fixed, nodes, sharing, elastic, self._workers)
        _build_extensions(clients, self._asked)
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
                _get(ref)
            except RayActorError:
                self._replace(tier, actor)
        initial: Initial = _get(next(iter(self._actors.values()))[0].initial.remote())
        return initial

    def train(
        self, assignments: Sequence[Assignment], downlinks: Mapping[ClientId, Any], states: Mapping[ClientId, Any]
    ) -> Iterator[tuple[Outcome, Any]]:
        """Yield each client's outcome and the reference of its next state, in completion order.

        Raises:
            ClientFailure: a client's actor died more often than `max_failures` allows.
        """
        sent = _pack({client: downlinks[client] for client in (entry.client.id for entry in assignments)})
        by_tier: dict[str, list[Assignment]] = {tier: [] for tier in self._actors}
        for assignment in assignments:
            by_tier[assignment.client.tier].append(assignment)
        waiting = {tier: Chunks(entries, self._max_failures) for tier, entries in by_tier.items()}
        idle = {tier: list(actors) for tier, actors in self._actors.items()}
        running: dict[Any, _Running] = {}
        while running or any(waiting.values()):
            for tier, chunks in waiting.items():
                while chunks and idle[tier]:
                    chunk, actor = chunks.take(len(self._actors[tier])), idle[tier].pop()
                    turns = [
                        Turn(entry, sent[id], states.get(id), self._shards[id])
                        for entry in chunk
                        for id in [entry.client.id]
                    ]
                    running[actor.train.remote(turns)] = _Running(tier, actor, chunk)
            (stream,), _ = ray.wait(list(running), num_returns=1)
            serving = running[stream]
            try:
                block = _next_block(stream)
            except RayActorError as error:
                del running[stream]
                waiting[serving.tier].failed(serving.chunk, serving.chunk[serving.finished :], error)
                idle[serving.tier].append(self._replace(serving.tier, serving.actor))
                continue
            if block is None:
                del running[stream]
                idle[serving.tier].append(serving.actor)
                continue
            next_states, outcomes = block
            serving.finished += len(outcomes)
            for index, outcome in enumerate(outcomes):
                yield outcome, Packed(next_states, index)

    def fetch(self, handle: Any) -> Any:
        """Return the state behind a handle."""
        return ray.get(handle.ref)[handle.index]

    def close(self) -> None:
        """End the actors."""
        closing = [actor.close.remote() for tier, actors in self._actors.items() for actor in actors]
        if closing:  # a silo's workers give their resources back themselves
            ray.wait(closing, num_returns=len(closing), timeout=CLOSE_TIMEOUT_S)
        for actors in self._actors.values():
            for actor in actors:
                ray.kill(actor)
        self._actors = {}

    def _start_together(self, sizes: Mapping[str, int]) -> dict[str, list[Any]]:
        started = [(tier, self._start(tier)) for tier, size in sizes.items() for _ in range(size)]
        up = [actor.ready.remote() for _, actor in started]
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
                    f"{_readable(self._asked[tier])}, the cluster has {_readable(_total(_nodes()))}"
                )
        return actors

    def _start(self, tier: str) -> Any:
        asked = dict(self._asked[tier])
        if self._workers[tier] > 1:
            return start_silo(self._workers[tier], asked)
        cpus, gpus, memory = asked.pop("CPU"), asked.pop("GPU"), asked.pop("memory")
        return ClientActor.options(  # type: ignore[attr-defined]
            num_cpus=cpus, num_gpus=gpus, memory=int(memory) or None, resources=asked or None
        ).remote(gpus)

    def _replace(self, tier: str, dead: Any) -> Any:
        """Return a new actor that is ready for the method. The old one is ended: it may only have been out of reach."""
        ray.kill(dead)
        actor = self._start(tier)
        self._actors[tier] = [actor if other is dead else other for other in self._actors[tier]]
        _get(actor.setup.remote(self._jobs[tier]))
        return actor


def _get(refs: Any) -> Any:
    """ray.get, with fedray's own errors as themselves and not wrapped in Ray's."""
    try:
        return ray.get(refs)
    except RayTaskError as error:
        if isinstance(error.cause, FedrayError):
            raise error.cause from None
        raise


def _build_extensions(clients: ClientsConfig, asked: Mapping[str, Amounts]) -> None:
    """Let every node that tiers with DeepSpeed may use build its extensions, all nodes at a time: it takes minutes on a
    new machine, and the first client's turn would take them. A node that comes later builds when its first actor does.

    Raises:
        ConfigError: a node lacks what they need.
    """
    building = [
        build_extensions.options(
            num_gpus=asked[tier]["GPU"],
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=True),
        ).remote(clients.tier(tier).offload, asked[tier]["GPU"])
        for tier in asked
        for node in _living()
        if clients.tier(tier).engine == "deepspeed" and fits(asked[tier], node["Resources"])
    ]
    _get(building)


@dataclass
class _Running:
    """A chunk that an actor works on. finished: how many of its clients have come back, in their order."""

    tier: str
    actor: Any
    chunk: list[Assignment]
    finished: int = 0


def _next_block(stream: Any) -> tuple[Any, list[Outcome]] | None:
    """Return the next block's states, as a reference, and its outcomes; None at the end of the chunk.

    Raises:
        RayActorError: the actor died. FedrayError: what the client's own code raised.
    """
    try:
        states = next(stream)
    except StopIteration:
        return None
    try:
        return states, _get(next(stream))
    except StopIteration:  # instead of a block there was an error
        _get(states)
        raise


def _pack(downlinks: Mapping[ClientId, Any]) -> dict[ClientId, Packed]:
    """Put what goes down into the object store: equal payloads once, large ones each, all small ones together."""
    distinct = {id(payload): payload for payload in downlinks.values()}
    small = {key: payload for key, payload in distinct.items() if num_bytes(payload) < SMALL_BYTES}
    together = ray.put(small)
    refs = {key: (together, key) if key in small else (ray.put([payload]), 0) for key, payload in distinct.items()}
    return {client: Packed(*refs[id(payload)]) for client, payload in downlinks.items()}


def _pack_shards(shards: Mapping[ClientId, Shard]) -> dict[ClientId, Packed]:
    ids = sorted(shards)
    packed: dict[ClientId, Packed] = {}
    for start in range(0, len(ids), PACK_CLIENTS):
        pack = {id: shards[id] for id in ids[start : start + PACK_CLIENTS]}
        ref = ray.put(pack)
        packed |= {id: Packed(ref, id) for id in pack}
    return packed


def _living() -> list[dict[str, Any]]:
    """Return what Ray knows of each living node."""
    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def _nodes() -> list[dict[str, float]]:
    """Return what each living node has in all."""
    return [node["Resources"] for node in _living()]


def _node_types() -> dict[str, dict[str, float]]:
    """Return what the autoscaler can add, by name of the node type; empty where there is no autoscaler."""
    config = ray._private.state.state.get_cluster_config()
    groups = [] if config is None else config.node_group_configs
    return {group.name: dict(group.resources) for group in groups if group.max_count != 0}


def _check_room(asked: Mapping[str, Amounts], nodes: Sequence[Amounts], workers: Mapping[str, int]) -> None:
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
    if not types and not fit_together(asked, nodes, workers):
        times = {tier: f"{number} workers of " if number > 1 else "" for tier, number in workers.items()}
        wanted = "; ".join(f"{tier}: {times[tier]}{_readable(amounts)}" for tier, amounts in asked.items())
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
