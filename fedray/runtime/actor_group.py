"""The life cycle of client actors. A lost actor is replaced while the others continue."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Any, Protocol

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedray.config import ClientsConfig
from fedray.errors import ConfigError, FedrayError
from fedray.federation.tasks import WorkerSetup
from fedray.planning.placement import Amounts, fits
from fedray.runtime.causes import lost_by, raised_by_code
from fedray.runtime.client_actor import ClientActor, prepare_node
from fedray.runtime.cluster import infeasible, living, living_nodes, readable, total_of
from fedray.runtime.messages import get, to_message
from fedray.runtime.policies import Replacement
from fedray.runtime.silo_actor import start_silo

log = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
"""Seconds to wait for all actors to start; actors that the cluster has no room for until then start later or never."""

NODE_TIMEOUT_S = 600.0
"""Seconds that a tier without any actor waits for one if nodes can be added, or if it had one: a node of an autoscaled
cluster takes minutes."""

INFEASIBLE_S = 10.0
"""Seconds that an autoscaler may take to notice new requests."""

LOOK_S = 1.0
"""Seconds between checks for what is overdue."""

CLOSE_TIMEOUT_S = 10.0
"""Seconds that silos may take to shut down; then they are killed."""


class ActorSource(Protocol):
    """Where the actors of a group come from."""

    def start(self, resources: Amounts, workers: int) -> Any:
        """Return an actor with these resources, or one that is several workers with these resources each."""

    def end(self, actor: Any) -> None:
        """End an actor that is lost or superfluous."""

    def release(self, actor: Any) -> None:
        """Take back an actor that is not needed any more."""


class OwnActors:
    """New actors, which end when they are not needed any more."""

    def start(self, resources: Amounts, workers: int) -> Any:
        """See `ActorSource.start`."""
        return start_silo(workers, dict(resources)) if workers > 1 else start_actor(resources)

    def end(self, actor: Any) -> None:
        """See `ActorSource.end`."""
        with suppress(RayError):
            ray.kill(actor)

    release = end


def start_actor(resources: Amounts) -> Any:
    """Return a new ClientActor."""
    others = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU", "memory")}
    return ClientActor.options(  # type: ignore[attr-defined]
        num_cpus=resources["CPU"],
        num_gpus=resources["GPU"],
        memory=int(resources["memory"]) or None,
        resources=others or None,
    ).remote(resources["GPU"])


@dataclass(eq=False)
class ActorHandle:
    """An actor of a tier.

    Attributes:
        actor: Ray's handle.
        location: node and process where the actor runs.
    """

    tier: str
    actor: Any
    location: str = ""


class ActorGroup:
    """The actors of all tiers.

    Args:
        sizes: how many actors of each tier to start; those without room on the cluster start once there is room.
        resources: by tier, what each actor requests.
        elastic: nodes can be added: the first actor of a tier may take minutes, and the others are requested when every
            tier has one (`grow`).
        source: where actors come from; by default they are new.

    Raises:
        ConfigError: a tier got no actor.
        FedrayError: an actor's own code raises an exception while it starts.
    """

    def __init__(
        self,
        clients: ClientsConfig,
        sizes: Mapping[str, int],
        resources: Mapping[str, Amounts],
        elastic: bool = False,
        source: ActorSource | None = None,
    ):
        self._elastic, self._source = elastic, source or OwnActors()
        self._workers = {tier: clients.tier(tier).workers for tier in sizes}
        self._resources = resources
        self._setups: Mapping[str, Any] = {}
        self._starting: dict[Any, ActorHandle] = {}
        self._empty_since: dict[str, float] = {}
        self._replacement = Replacement()
        self._delayed: list[tuple[float, str]] = []  # when to start another actor of a tier
        _prepare_nodes(clients, resources)
        self.handles: dict[str, list[ActorHandle]] = {tier: [] for tier in sizes}
        self._start_together(dict.fromkeys(sizes, 1) if elastic else sizes)

    def setup(self, setups: Mapping[str, WorkerSetup]) -> None:
        """Make every actor ready for a method.

        Raises:
            FedrayError: an actor's own code raises an exception.
        """
        self._setups = {tier: ray.put(to_message(setup)) for tier, setup in setups.items()}
        self._starting = {self._set_up(handle): handle for handle in self._starting.values()}
        for handle, ref in [(handle, self._set_up(handle)) for handle in self._all()]:
            try:
                handle.location = get(ref)
            except RayError as error:
                _check_raised(handle.tier, error)
                self.replace(handle, lost_by(error))
        while not all(self.handles.values()):
            for ref in self.wait([]):
                self.started(ref)

    def replace(self, lost: ActorHandle, cause: str) -> None:
        """Start another actor in place of a lost one, which is ended: it may only be out of reach."""
        log.warning("tier %s: an actor on %s is replaced: %s", lost.tier, lost.location or "a node", cause)
        self.release(lost)
        self._begin(lost.tier)

    def release(self, handle: ActorHandle) -> None:
        """End an actor that is not needed for now."""
        self._source.end(handle.actor)
        self.handles[handle.tier] = [other for other in self.handles[handle.tier] if other is not handle]

    def grow(self, sizes: Mapping[str, int]) -> None:
        """Start actors until each tier has this many, those that are starting included."""
        coming = Counter(handle.tier for handle in self._starting.values()) + Counter(tier for _, tier in self._delayed)
        for tier, size in sizes.items():
            for _ in range(size - len(self.handles[tier]) - coming[tier]):
                self._begin(tier)

    def wait(self, streams: Sequence[Any]) -> list[Any]:
        """Wait up to a second for one of the streams, or for an actor that is starting (`started`).

        Returns:
            What is ready, in a list; an empty list if nothing is.

        Raises:
            FedrayError: a tier has been without actors for too long.
        """
        self._start_delayed()
        if waiting := [*streams, *self._starting]:
            ready, _ = ray.wait(waiting, timeout=LOOK_S)
            return list(ready)
        sleep(0.1)
        return []

    def started(self, ref: Any) -> ActorHandle | None:
        """Return the actor whose reference is ready; None if it died, and then a replacement is scheduled.

        Raises:
            FedrayError: actors of this tier die whenever they start, or their own code raises an exception.
        """
        handle = self._starting.pop(ref)
        try:
            handle.location = get(ref)
        except RayError as error:
            _check_raised(handle.tier, error)
            delay = self._replacement.died(handle.tier, monotonic())
            if delay is None:
                raise FedrayError(
                    f"clients: actors of tier {handle.tier!r} that should replace others died while they started, "
                    f"{self._replacement.deaths(handle.tier)} times in a row: {lost_by(error)}"
                ) from None
            self._delayed.append((monotonic() + delay, handle.tier))
            return None
        self._replacement.started(handle.tier)
        self._empty_since.pop(handle.tier, None)
        self.handles[handle.tier].append(handle)
        return handle

    def close(self) -> None:
        """End all actors."""
        handles = [*self._all(), *self._starting.values()]
        silos = [handle.actor for handle in handles if self._workers[handle.tier] > 1]
        if closing := [silo.close.remote() for silo in silos]:  # their workers release resources themselves
            ray.wait(closing, num_returns=len(closing), timeout=CLOSE_TIMEOUT_S)
        for handle in self._starting.values():
            self._source.end(handle.actor)
        for handle in self._all():
            self._source.release(handle.actor)
        self.handles, self._starting = {tier: [] for tier in self.handles}, {}

    def _all(self) -> Iterator[ActorHandle]:
        return (handle for handles in self.handles.values() for handle in handles)

    def _start_delayed(self) -> None:
        """Start the actors whose time has come.

        Raises:
            FedrayError: a tier has been without actors for too long.
        """
        now = monotonic()
        for entry in [entry for entry in self._delayed if entry[0] <= now]:
            self._delayed.remove(entry)
            self._begin(entry[1])
        for tier, since in self._empty_since.items():
            if not self.handles[tier] and now - since > NODE_TIMEOUT_S:
                raise FedrayError(
                    f"clients: no actor of tier {tier!r} could be started again in {NODE_TIMEOUT_S:.0f} s; each "
                    f"requests {readable(self._resources[tier])}, the cluster has {readable(total_of(living_nodes()))}"
                )

    def _begin(self, tier: str) -> None:
        handle = ActorHandle(tier, self._start(tier))
        self._starting[self._set_up(handle)] = handle
        if not self.handles[tier]:
            self._empty_since.setdefault(tier, monotonic())

    def _set_up(self, handle: ActorHandle) -> Any:
        return handle.actor.setup.remote(self._setups[handle.tier])

    def _start_together(self, sizes: Mapping[str, int]) -> None:
        """Start actors and wait until all have started or time is up.

        Raises:
            ConfigError: a tier has no actor.
            FedrayError: an actor's own code raises an exception.
        """
        handles = [ActorHandle(tier, self._start(tier)) for tier, size in sizes.items() for _ in range(size)]
        self._starting = {handle.actor.ready.remote(): handle for handle in handles}
        begun, patience = monotonic(), NODE_TIMEOUT_S if self._elastic else START_TIMEOUT_S
        while self._starting and monotonic() - begun < patience:
            done, _ = ray.wait(list(self._starting), timeout=LOOK_S)
            for ref in done:
                handle = self._starting.pop(ref)
                self.handles[handle.tier].append(handle)
                self._check_started(handle, ref)
            if self._elastic and monotonic() - begun > INFEASIBLE_S:
                self._check_feasible()
        for tier in self._empty():
            self.close()
            raise ConfigError(
                f"clients: no client actor of tier {tier!r} could start in {monotonic() - begun:.0f} s; each requests "
                f"{readable(self._resources[tier])}, the cluster has {readable(total_of(living_nodes()))}"
            )

    def _check_started(self, handle: ActorHandle, ref: Any) -> None:
        """Check that an actor whose process has started could be constructed. An actor that has died is replaced later,
        by `setup`.

        Raises:
            FedrayError: its own code raises an exception.
        """
        try:
            try:
                get(ref)
            except RayError as error:
                _check_raised(handle.tier, error)
        except FedrayError:
            self.close()
            raise

    def _check_feasible(self) -> None:
        """Check that the autoscaler can add a node for each tier that has no actor.

        Raises:
            ConfigError: the autoscaler has no type of node for a tier without actors.
        """
        for tier in self._empty():
            if infeasible(self._resources[tier]):
                self.close()
                raise ConfigError(
                    f"clients: an actor of tier {tier!r} requests {readable(self._resources[tier])}, and the cluster's "
                    "autoscaler has no type of node for it, or may add no more of them"
                )

    def _empty(self) -> list[str]:
        return [tier for tier, handles in self.handles.items() if not handles]

    def _start(self, tier: str) -> Any:
        return self._source.start(self._resources[tier], self._workers[tier])


def _check_raised(tier: str, error: RayError) -> None:
    """Check that an actor was lost, and did not fail by an exception of its own code, which every other actor would
    raise, too.

    Raises:
        FedrayError: it failed by an exception.
    """
    if (raised := raised_by_code(error)) is not None:
        raise FedrayError(f"clients: an actor of tier {tier!r} cannot be set up: {raised}") from error


def _prepare_nodes(clients: ClientsConfig, resources: Mapping[str, Amounts]) -> None:
    """Prepare every node that a tier may use for the tier's engine, all nodes in parallel.

    Compiling extensions takes minutes on a new machine, and would delay the first client otherwise. A node that joins
    later is prepared when its first actor starts.

    Raises:
        ConfigError: a node lacks what an engine needs.
        FedrayError: an engine's own code raises an exception.
    """
    preparing = {
        prepare_node.options(
            num_gpus=resources[tier]["GPU"],
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=True),
        ).remote(to_message(clients.tier(tier).engine), resources[tier]["GPU"]): tier
        for tier in resources
        for node in living()
        if clients.tier(tier).engine.prepares_node and fits(resources[tier], node["Resources"])
    }
    for ref, tier in preparing.items():
        try:
            get(ref)
        except RayError as error:
            _check_raised(tier, error)
            raise
