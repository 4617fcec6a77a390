"""Policies of the pool and the actor group, without Ray: how many actors there should be, and when an actor that died
during its start is started again."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedray.config import ClientsConfig
from fedray.planning.placement import Amounts, allot_shared, allot_with_gpus, requests

MAX_REQUESTED = 100
"""Most actors of a tier that are requested from an autoscaler if `clients.actors` is not set."""

IDLE_S = 60.0
"""With an autoscaler, actors that have been idle this long are released until the next round."""

MAX_DEATHS, DYING_S = 3, 60.0
"""Actors that die during their start are started again after growing delays. The pool gives up after more than this
many deaths in a row over more than this many seconds."""


class Scaling:
    """Decides how many actors of each tier there should be: as many as the cohort can use and the nodes have room for;
    with an autoscaler, as many as the cohort can use.

    Args:
        cohorts: by tier, the most clients that a round can have.
        nodes: resources of each node.
        elastic: whether an autoscaler adds nodes.
        num_pools: pools that share the cluster.

    Attributes:
        sizes: actors of each tier.
        workers: by tier, number of processes of one actor.
        requested: what one actor (one worker of a silo) of each tier requests, without its share of the GPUs if the
            configuration names none.
        resources: the same with its share.
    """

    def __init__(
        self,
        clients: ClientsConfig,
        cohorts: Mapping[str, int],
        nodes: Sequence[Amounts],
        elastic: bool,
        num_pools: int = 1,
    ):
        self._cohorts, self._elastic, self._num_pools, self._num_nodes = cohorts, elastic, num_pools, len(nodes)
        self._fixed = {tier: clients.tier(tier).actors for tier in cohorts}
        self.workers = {tier: clients.tier(tier).workers for tier in cohorts}
        sharing = [tier for tier in cohorts if clients.tier(tier).num_gpus is None and self.workers[tier] == 1]
        self.requested = requests(clients, list(cohorts), nodes)
        self.sizes, self.resources = allot_with_gpus(self.requested, cohorts, self._fixed, nodes, sharing, self.workers)
        if elastic:
            self.sizes = {
                tier: self._fixed[tier] or min(math.ceil(most / num_pools), MAX_REQUESTED)
                for tier, most in cohorts.items()
            }
        elif num_pools > 1:
            self.sizes = self._shared(nodes)

    def nodes_changed(self, nodes: Sequence[Amounts]) -> bool:
        """Record the current nodes; return whether `sizes` may have grown. With an autoscaler they never grow: all
        actors have been requested already."""
        joined = len(nodes) > self._num_nodes
        self._num_nodes = len(nodes)
        if joined and not self._elastic:
            self.sizes = self._shared(nodes)
        return joined and not self._elastic

    def releases(self, idle_seconds: float) -> bool:
        """Return whether a tier's idle actors should be released, all but one, so that the autoscaler can remove their
        nodes."""
        return self._elastic and idle_seconds > IDLE_S

    def _shared(self, nodes: Sequence[Amounts]) -> dict[str, int]:
        return allot_shared(self.resources, self._cohorts, self._fixed, nodes, self._num_pools, self.workers)


@dataclass
class _Deaths:
    """Consecutive deaths of a tier's actors during their start.

    Attributes:
        since: time of the first one.
    """

    since: float
    number: int = 0


class Replacement:
    """Decides when an actor that died during its start is started again."""

    def __init__(self) -> None:
        self._deaths: dict[str, _Deaths] = {}

    def died(self, tier: str, now: float) -> float | None:
        """Record a death during a start; return the seconds to wait before the tier's next actor is started, or None to
        give up.

        A death may be temporary: Ray may not know yet that a node is gone, and start the actor there.
        """
        deaths = self._deaths.setdefault(tier, _Deaths(now))
        deaths.number += 1
        if deaths.number > MAX_DEATHS and now - deaths.since > DYING_S:
            return None
        return min(2.0**deaths.number, DYING_S / 4)

    def deaths(self, tier: str) -> int:
        """Return how many actors of the tier died in a row."""
        return self._deaths[tier].number if tier in self._deaths else 0

    def started(self, tier: str) -> None:
        """Record that an actor of the tier has started."""
        self._deaths.pop(tier, None)
