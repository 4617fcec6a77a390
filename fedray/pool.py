"""ClientPool: the cohort on client actors.

An actor that dies is replaced, and the clients that it had not finished are run again elsewhere from the round's
inputs, each at most `clients.max_failures` times. An exception in a client's own code is not the machine's fault and
ends the run.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import ray
import ray._private.state
from ray.exceptions import ObjectLostError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedray.blocks import BLOCK_SECONDS, Block, state_files
from fedray.chunks import Chunks, Group, groups, work_of
from fedray.client import ClientActor, build_extensions
from fedray.cluster import check_room, living, living_nodes, node_types, readable, total_of
from fedray.config import ClientsConfig
from fedray.data.shards import Shard
from fedray.errors import ConfigError
from fedray.methods.protocol import Initial
from fedray.packing import Amounts, allot_with_gpus, fits, requests
from fedray.silo import start_silo
from fedray.state_files import StateFiles, StateRef
from fedray.training.metering import MemoryUse
from fedray.turns import Packed, Turn, chunk_of, get, next_block, pack_downlinks, pack_shards
from fedray.types import ClientId
from fedray.worker import Assignment, Job

START_TIMEOUT_S = 120.0
"""How long to wait for actors to start; those that the cluster has no room for until then are given up."""

SMOOTHING = 0.1
"""Weight of the latest block in the moving average of the seconds that handling one takes."""

CLOSE_TIMEOUT_S = 10.0
"""How long silos may take to end in order; then they are killed."""


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
        self._widths: dict[str, int] = {}
        self._shards = pack_shards(shards)
        self._jobs: dict[str, Any] = {}
        self._files: StateFiles | None = None
        self._paces: dict[str, _Pace] = {}
        self._handling = 0.0  # seconds in which a block is taken and made use of, a moving average
        nodes = living_nodes()
        asked = requests(clients, list(cohorts), nodes)
        elastic = bool(node_types())
        check_room(asked, nodes, self._workers)
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
        self._paces = {tier: _Pace() for tier in jobs}
        self._files = state_files(next(iter(jobs.values())))
        self._widths = {tier: job.config.clients.tier(tier).fuse_width for tier, job in jobs.items()}
        ready = [
            (tier, actor, actor.setup.remote(self._jobs[tier]))
            for tier, actors in self._actors.items()
            for actor in actors
        ]
        for tier, actor, ref in ready:
            try:
                get(ref)
            except RayActorError:
                self._replace(tier, actor)
        initial: Initial = get(next(iter(self._actors.values()))[0].initial.remote())
        return initial

    def train(
        self, assignments: Sequence[Assignment], downlinks: Mapping[ClientId, Any], states: Mapping[ClientId, StateRef]
    ) -> Iterator[Block]:
        """Yield clients in completion order.

        Raises:
            ClientFailure: a client's actor died more often than `max_failures` allows.
        """
        sent = pack_downlinks({client: downlinks[client] for client in (entry.client.id for entry in assignments)})
        by_tier = groups(assignments, self._widths)
        waiting = {tier: Chunks(entries, self._max_failures) for tier, entries in by_tier.items()}
        idle = {tier: list(actors) for tier, actors in self._actors.items()}
        running: dict[Any, _Running] = {}
        while running or any(waiting.values()):
            for tier, chunks in waiting.items():
                while chunks and idle[tier]:
                    lasting = self._block_seconds()
                    worthwhile = self._paces[tier].work_in(lasting)
                    chunk, actor = chunks.take(len(self._actors[tier]), worthwhile), idle[tier].pop()
                    turns = [self._turns(group, sent, states) for group in chunk]
                    running[actor.train.remote(chunk_of(turns, lasting))] = _Running(tier, actor, chunk)
            (stream,), _ = ray.wait(list(running), num_returns=1)
            started = perf_counter()
            serving = running[stream]
            try:
                block = next_block(stream)
            except (RayActorError, ObjectLostError) as error:  # the actor died, or its node with the block
                del running[stream]
                waiting[serving.tier].failed(serving.chunk, serving.finished, error)
                idle[serving.tier].append(self._replace(serving.tier, serving.actor))
                continue
            serving.finished += len(block.outcomes)
            self._paces[serving.tier].add(block)
            if block.last:
                del running[stream]
                idle[serving.tier].append(serving.actor)
            yield block
            self._handling += SMOOTHING * (perf_counter() - started - self._handling)

    def actors(self, tier: str) -> int:
        """Return how many actors serve the tier."""
        return len(self._actors[tier])

    def fuse_width(self, assignments: Sequence[Assignment], downlinks: Mapping[ClientId, Any]) -> int:
        """Return how many clients of the assignments' tier are best trained in one step, as one of its actors finds."""
        actor = self._actors[assignments[0].client.tier][0]
        turns = self._turns(assignments, pack_downlinks(downlinks), {})
        found: int = get(actor.fuse_width.remote(chunk_of([turns])))
        return found

    def _block_seconds(self) -> float:
        """As long as it takes to handle a block of everybody: more actors never send more than can be taken."""
        return max(BLOCK_SECONDS, self._handling * sum(map(len, self._actors.values())))

    def _turns(
        self, group: Sequence[Assignment], sent: Mapping[ClientId, Packed], states: Mapping[ClientId, StateRef]
    ) -> list[Turn]:
        ids = [assignment.client.id for assignment in group]
        return [Turn(entry, sent[id], states.get(id), self._shards[id]) for entry, id in zip(group, ids, strict=True)]

    def fetch(self, refs: Sequence[StateRef]) -> list[Any]:
        """Return the states."""
        return [] if self._files is None else self._files.read(refs)

    def forget(self, refs: Sequence[StateRef]) -> None:
        """Delete states that nobody needs any more."""
        if self._files is not None:
            self._files.forget(refs)

    def memory(self) -> dict[str, list[MemoryUse]]:
        """Return what each actor has taken at most since `setup`, by tier; one that died just now is left out."""
        uses: dict[str, list[MemoryUse]] = {tier: [] for tier in self._actors}
        asked = [(tier, actor.memory.remote()) for tier, actors in self._actors.items() for actor in actors]
        for tier, ref in asked:
            with suppress(RayActorError):
                uses[tier].append(get(ref))
        return uses

    def close(self) -> None:
        """End the actors."""
        silos = [actor for tier, actors in self._actors.items() for actor in actors if self._workers[tier] > 1]
        if closing := [silo.close.remote() for silo in silos]:  # their workers give resources back themselves
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
                    f"{readable(self._asked[tier])}, the cluster has {readable(total_of(living_nodes()))}"
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
        get(actor.setup.remote(self._jobs[tier]))
        return actor


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
        for node in living()
        if clients.tier(tier).engine == "deepspeed" and fits(asked[tier], node["Resources"])
    ]
    get(building)


@dataclass
class _Pace:
    """How fast a tier's actors have been with this method."""

    seconds: float = 0.0
    work: int = 0

    def add(self, block: Block) -> None:
        self.seconds += block.seconds
        self.work += sum(work_of(outcome.update.client) for outcome in block.outcomes)

    def work_in(self, seconds: float) -> float:
        """Return the work that an actor does in this time; 0 while nothing is known."""
        return seconds * self.work / self.seconds if self.seconds else 0.0


@dataclass
class _Running:
    """A chunk that an actor works on. finished: how many of its clients have come back, in their order."""

    tier: str
    actor: Any
    chunk: list[Group]
    finished: int = 0
