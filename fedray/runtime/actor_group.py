"""Client actors from start to end. One that is lost is replaced while the others go on."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Any, Protocol

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedray.config import ClientsConfig
from fedray.errors import ConfigError, FedrayError
from fedray.federation.worker import WorkerSetup
from fedray.planning.placement import Amounts, fits
from fedray.runtime.client_actor import ClientActor, build_extensions
from fedray.runtime.cluster import infeasible, living, living_nodes, readable, total_of
from fedray.runtime.messages import get
from fedray.runtime.silo_actor import start_silo

log = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
"""How long to wait for all actors to start; those that the cluster has no room for until then come later or never."""

NODE_TIMEOUT_S = 600.0
"""How long a tier without any actor waits for one where nodes can be added, or where it had one: a node of an
autoscaled cluster takes minutes."""

MOST_DEATHS, DYING_S = 3, 60.0
"""Actors that die while they start are started again, ever later, until there were more deaths than this in a row and
they took this long."""

INFEASIBLE_S = 10.0
"""How long an autoscaler may take to see what is asked for now."""

LOOK_S = 1.0
"""How often to look whether something is overdue."""

CLOSE_TIMEOUT_S = 10.0
"""How long silos may take to end in order; then they are killed."""


class ActorSource(Protocol):
    """Where a crew's actors come from."""

    def start(self, asked: Amounts, workers: int) -> Any:
        """Return an actor, or several workers as one, that asks for these resources (each of them)."""

    def end(self, handle: Any) -> None:
        """End an actor that is lost or superfluous."""

    def release(self, handle: Any) -> None:
        """Take an actor that is not needed any more."""


class Own:
    """Actors of one's own, which end when they are not needed."""

    def start(self, asked: Amounts, workers: int) -> Any:
        return start_silo(workers, dict(asked)) if workers > 1 else start_actor(asked)

    def end(self, handle: Any) -> None:
        with suppress(RayError):
            ray.kill(handle)

    release = end


def start_actor(asked: Amounts) -> Any:
    others = {name: amount for name, amount in asked.items() if name not in ("CPU", "GPU", "memory")}
    return ClientActor.options(  # type: ignore[attr-defined]
        num_cpus=asked["CPU"], num_gpus=asked["GPU"], memory=int(asked["memory"]) or None, resources=others or None
    ).remote(asked["GPU"])


@dataclass(eq=False)
class ActorHandle:
    """An actor of a tier. node: where it runs, and as which process."""

    tier: str
    handle: Any
    node: str = ""


@dataclass
class _Dying:
    """Deaths in a row of a tier's actors that were starting."""

    since: float
    deaths: int = 0


class ActorGroup:
    """The actors of all tiers.

    sizes: how many of each tier to start; those that the cluster has no room for come when it has. asked: what each
    asks for. elastic: nodes can be added: the first actor of a tier may take minutes, and the others are asked for when
    every tier has one (`grow`).

    Raises:
        ConfigError: a tier got none.
    """

    def __init__(
        self,
        clients: ClientsConfig,
        sizes: Mapping[str, int],
        asked: Mapping[str, Amounts],
        elastic: bool = False,
        source: ActorSource | None = None,
    ):
        self._elastic, self._source = elastic, source or Own()
        self._workers = {tier: clients.tier(tier).workers for tier in sizes}
        self._asked = asked
        self._jobs: Mapping[str, Any] = {}
        self._starting: dict[Any, ActorHandle] = {}
        self._alone_since: dict[str, float] = {}
        self._dying: dict[str, _Dying] = {}
        self._later: list[tuple[float, str]] = []  # when to start another actor of a tier
        _build_extensions(clients, asked)
        self.members: dict[str, list[ActorHandle]] = {tier: [] for tier in sizes}
        self._start_together(dict.fromkeys(sizes, 1) if elastic else sizes)

    def setup(self, jobs: Mapping[str, WorkerSetup]) -> None:
        """Make every actor ready for a method."""
        self._jobs = {tier: ray.put(job) for tier, job in jobs.items()}
        self._starting = {self._set_up(member): member for member in self._starting.values()}
        asked = [(member, self._set_up(member)) for members in self.members.values() for member in members]
        for member, ref in asked:
            try:
                member.node = get(ref)
            except RayError as error:
                self.replace(member, error)
        while not all(self.members.values()):
            for ref in self.wait([]):
                self.started(ref)

    def replace(self, lost: ActorHandle, error: object) -> None:
        """Start another actor in the place of one that is lost. That one is ended: it may only be out of reach."""
        log.warning("tier %s: an actor on %s is replaced: %s", lost.tier, lost.node or "a node", error)
        self.release(lost)
        self._begin(lost.tier)

    def release(self, member: ActorHandle) -> None:
        """End an actor that is not needed for now."""
        self._source.end(member.handle)
        self.members[member.tier] = [other for other in self.members[member.tier] if other is not member]

    def grow(self, sizes: Mapping[str, int]) -> None:
        """Start actors until there are so many of each tier, or are about to be."""
        coming = Counter(member.tier for member in self._starting.values()) + Counter(tier for _, tier in self._later)
        for tier, size in sizes.items():
            for _ in range(size - len(self.members[tier]) - coming[tier]):
                self._begin(tier)

    def wait(self, streams: Sequence[Any]) -> list[Any]:
        """Wait for one of the streams, or for an actor that replaces another (`started`), and return it; nothing if
        there is none for a second.

        Raises:
            FedrayError: a tier has been without actors for too long.
        """
        self._look_after()
        if waiting := [*streams, *self._starting]:
            ready, _ = ray.wait(waiting, timeout=LOOK_S)
            return list(ready)
        sleep(0.1)
        return []

    def started(self, ref: Any) -> ActorHandle | None:
        """Return the actor whose reference is ready; None where it died: another one is started a little later.

        Raises:
            FedrayError: actors of this tier die whenever they start.
        """
        member = self._starting.pop(ref)
        try:
            member.node = get(ref)
        except RayError as error:
            dying = self._dying.setdefault(member.tier, _Dying(monotonic()))
            dying.deaths += 1
            if dying.deaths > MOST_DEATHS and monotonic() - dying.since > DYING_S:
                raise FedrayError(
                    f"clients: actors of tier {member.tier!r} that should replace others died while they started, "
                    f"{dying.deaths} times in a row: {first_line(error)}"
                ) from None
            # Ray may not know yet that a node is gone, and start it there.
            self._later.append((monotonic() + min(2.0**dying.deaths, DYING_S / 4), member.tier))
            return None
        self._dying.pop(member.tier, None)
        self._alone_since.pop(member.tier, None)
        self.members[member.tier].append(member)
        return member

    def _look_after(self) -> None:
        """Start actors whose time has come; lose patience with tiers that get none."""
        now = monotonic()
        for entry in [entry for entry in self._later if entry[0] <= now]:
            self._later.remove(entry)
            self._begin(entry[1])
        for tier, since in self._alone_since.items():
            if not self.members[tier] and now - since > NODE_TIMEOUT_S:
                raise FedrayError(
                    f"clients: no actor of tier {tier!r} could be started again in {NODE_TIMEOUT_S:.0f} s; each "
                    f"asks for {readable(self._asked[tier])}, the cluster has {readable(total_of(living_nodes()))}"
                )

    def close(self) -> None:
        """End all actors."""
        everybody = [member for members in self.members.values() for member in members] + list(self._starting.values())
        silos = [member.handle for member in everybody if self._workers[member.tier] > 1]
        if closing := [silo.close.remote() for silo in silos]:  # their workers give resources back themselves
            ray.wait(closing, num_returns=len(closing), timeout=CLOSE_TIMEOUT_S)
        for member in self._starting.values():
            self._source.end(member.handle)
        for member in (member for members in self.members.values() for member in members):
            self._source.release(member.handle)
        self.members, self._starting = {tier: [] for tier in self.members}, {}

    def _begin(self, tier: str) -> None:
        member = ActorHandle(tier, self._start(tier))
        self._starting[self._set_up(member)] = member
        if not self.members[tier]:
            self._alone_since.setdefault(tier, monotonic())

    def _set_up(self, member: ActorHandle) -> Any:
        return member.handle.setup.remote(self._jobs[member.tier])

    def _start_together(self, sizes: Mapping[str, int]) -> None:
        """Start actors and wait until all are up, or for so long; at least one of each tier must be."""
        started = [ActorHandle(tier, self._start(tier)) for tier, size in sizes.items() for _ in range(size)]
        self._starting = {member.handle.ready.remote(): member for member in started}
        begun, patience = monotonic(), NODE_TIMEOUT_S if self._elastic else START_TIMEOUT_S
        while self._starting and monotonic() - begun < patience:
            done, _ = ray.wait(list(self._starting), timeout=LOOK_S)
            for ref in done:
                member = self._starting.pop(ref)
                self.members[member.tier].append(member)
            if self._elastic and monotonic() - begun > INFEASIBLE_S:
                for tier in (tier for tier, ready in self.members.items() if not ready):
                    if infeasible(self._asked[tier]):
                        self.close()
                        raise ConfigError(
                            f"clients: an actor of tier {tier!r} asks for {readable(self._asked[tier])}, and the "
                            "cluster's autoscaler has no type of node for it, or may add no more of them"
                        )
        for tier in (tier for tier, ready in self.members.items() if not ready):
            self.close()
            raise ConfigError(
                f"clients: no client actor of tier {tier!r} could start in {monotonic() - begun:.0f} s; each asks for "
                f"{readable(self._asked[tier])}, the cluster has {readable(total_of(living_nodes()))}"
            )

    def _start(self, tier: str) -> Any:
        return self._source.start(self._asked[tier], self._workers[tier])


def first_line(error: BaseException) -> str:
    """Return the part of Ray's long messages that says what happened."""
    lines: Sequence[str] = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


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
