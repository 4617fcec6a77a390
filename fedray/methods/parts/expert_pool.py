"""LoRA experts (FedLEASE): the server's, one with a router per cluster of clients, and their places in an adapter."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedray.adapters.adapter import Adapter
from fedray.adapters.layout import Layout
from fedray.aggregation.low_rank import concatenate
from fedray.aggregation.trees import best_cut, cuts, mean_distances
from fedray.methods.parts.capacity import held_mean, places
from fedray.methods.parts.factors import join, split
from fedray.types import ClientId, Vector, state_type


@state_type("ExpertPool.Trained")
@dataclass(frozen=True)
class Trained:
    """What a client trained: its LoRA, in its own layout, and its router."""

    layout: Layout
    lora: Vector
    router: Vector


@state_type("ExpertPool")
@dataclass(frozen=True)
class ExpertPool:
    """Clusters of clients.

    Attributes:
        layout: of the common LoRA.
        lora: the first values of a LoRA: of those components of an expert that nobody in its cluster holds.
        router: the first values of a cluster's router.
        alone: the clients in no cluster that have trained, and what they sent last.
        labels: each clustered client's cluster.
        experts: the clusters' LoRAs; none before there are clusters.
        routers: the clusters' routers.
    """

    layout: Layout
    lora: Vector
    router: Vector
    alone: Mapping[ClientId, Trained]
    labels: Mapping[ClientId, int]
    experts: tuple[Vector, ...]
    routers: tuple[Vector, ...]

    def with_alone(self, updates: Mapping[ClientId, Trained]) -> "ExpertPool":
        """Return the pool with what clients in no cluster sent."""
        new = {id: trained for id, trained in updates.items() if id not in self.labels}
        return replace(self, alone={**self.alone, **new})

    def clustered(self, most: int) -> "ExpertPool":
        """Return at most so many clusters of the clients that trained alone, and fewer than there are clients, with
        their means as experts."""
        ids = sorted(self.alone)
        distances = mean_distances([split(self.alone[id].layout, self.alone[id].lora) for id in ids])
        candidates = cuts(distances, min(most, len(ids) - 1))
        labels = dict(zip(ids, candidates[best_cut(distances, candidates)].tolist(), strict=True))
        experts = tuple(
            self._mean(self.lora, [self.alone[id] for id in ids if labels[id] == label])
            for label in range(1 + max(labels.values()))
        )
        return replace(self, alone={}, labels=labels, experts=experts, routers=(self.router,) * len(experts))

    def moved(self, updates: Mapping[ClientId, Trained]) -> "ExpertPool":
        """Return the pool with each expert and router at the unweighted mean of those that came from its cluster. The
        clients that trained alone join the cluster of the nearest expert."""
        experts, routers = list(self.experts), list(self.routers)
        for label in range(len(experts)):
            sent = [trained for id, trained in updates.items() if self.labels.get(id) == label]
            experts[label] = self._mean(experts[label], sent)
            routers[label] = held_mean(routers[label], [(None, t.router) for t in sent], [1.0] * len(sent))
        known = [split(self.layout, expert) for expert in experts]
        joined = {
            id: int(mean_distances([split(t.layout, t.lora), *known])[0, 1:].argmin()) for id, t in self.alone.items()
        }
        return replace(self, alone={}, labels={**self.labels, **joined}, experts=tuple(experts), routers=tuple(routers))

    def _mean(self, previous: Vector, trained: Sequence[Trained]) -> Vector:
        return held_mean(previous, [(places(self.layout, t.layout), t.lora) for t in trained], [1.0] * len(trained))


def load_experts(adapter: Adapter, own: Vector, others: Sequence[Vector], router: Vector) -> None:
    """Load the experts, in the places that the second branch has for them, and the router.

    Args:
        own: one's own expert, [layout("lora").size].
        others: at most as many as there are places.
        router: G, [layout("mixer.G").size].
    """
    layout, present = adapter.layout("lora"), adapter.layout("mixer.present")
    room = present.slots[0].size
    filled = [*others, *[np.zeros_like(own)] * (room - len(others))]
    targets = zip(*(split(layout, expert) for expert in filled), strict=True)
    adapter.load("lora", own)
    adapter.load("rest", join([concatenate([(1.0, x) for x in target]) for target in targets]))
    adapter.load("mixer.present", np.tile(np.arange(room) < len(others), len(present.slots)).astype(np.float32))
    adapter.load("mixer.G", router)
