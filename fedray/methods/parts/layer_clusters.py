"""Clusters of clients that differ from layer to layer, and one LoRA per cluster and layer (FedTreeLoRA).

A layer is a block of the model: the targets whose paths agree up to the first number.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from fedray.adapters.layout import Layout
from fedray.aggregation.points import Matrix
from fedray.aggregation.trees import best_cut, cuts, mean_distances
from fedray.methods.parts.capacity import Places, held_mean
from fedray.methods.parts.factors import Delta
from fedray.types import ClientId, Vector, state_type


@state_type("LayerClusters")
@dataclass(frozen=True)
class LayerClusters:
    """Clusters in every layer.

    Attributes:
        layout: of a LoRA.
        labels: by client its cluster in each layer; at first there are none, and one cluster per layer.
        states: by layer and cluster its values of that layer.
    """

    layout: Layout
    labels: Mapping[ClientId, tuple[int, ...]]
    states: tuple[tuple[Vector, ...], ...]

    @classmethod
    def of(cls, layout: Layout, vector: Vector) -> "LayerClusters":
        """Return one cluster per layer, with these values [layout.size]."""
        return cls(layout, {}, tuple((vector[columns],) for _, columns in layers(layout)))

    def own(self, labels: tuple[int, ...] | None) -> Vector:
        """Return the values of the clusters with these labels; None: the mean over all clients. [layout.size]"""
        chosen = [self._mean(level, None if labels is None else [labels[level]]) for level in range(len(self.states))]
        return self._joined([values for values in chosen if values is not None])

    def rest(self, labels: tuple[int, ...] | None) -> Vector:
        """Return the mean over all clients outside of these clusters, zero where there are none. [layout.size]"""
        found = []
        for level, states in enumerate(self.states):
            others = [] if labels is None else [label for label in range(len(states)) if label != labels[level]]
            mean = self._mean(level, others)
            found.append(np.zeros_like(states[0]) if mean is None else mean)
        return self._joined(found)

    def moved(self, vectors: Mapping[ClientId, Vector], counts: Mapping[ClientId, int]) -> "LayerClusters":
        """Return the clusters at the means of their members.

        Args:
            vectors: by client, [layout.size], NaN where the client holds nothing. A value that no member holds stays.
            counts: how much each client counts.
        """
        states = []
        for level, (_, columns) in enumerate(layers(self.layout)):
            members: list[list[ClientId]] = [[] for _ in self.states[level]]
            for id in vectors:
                members[self.labels[id][level] if id in self.labels else 0].append(id)
            states.append(
                tuple(
                    held_mean(state, [_placed(vectors[id][columns]) for id in ids], [counts[id] for id in ids])
                    for state, ids in zip(self.states[level], members, strict=True)
                )
            )
        return replace(self, states=tuple(states))

    def _mean(self, level: int, labels: Sequence[int] | None) -> Vector | None:
        """Return the mean over the clients of some clusters (None: of all); None if there are no such clients."""
        states = self.states[level]
        if labels is None and len(states) == 1:
            return states[0]
        sizes = np.bincount([own[level] for own in self.labels.values()], minlength=len(states))
        chosen = [label for label in (range(len(states)) if labels is None else labels) if sizes[label]]
        if len(chosen) <= 1:
            return states[chosen[0]] if chosen else None
        weights = sizes[chosen] / sizes[chosen].sum()
        mean: Matrix = np.tensordot(weights, np.stack([states[label] for label in chosen]).astype(np.float64), 1)
        return mean.astype(np.float32)

    def _joined(self, values: Sequence[Vector]) -> Vector:
        vector = np.empty(self.layout.size, np.float32)
        for (_, columns), found in zip(layers(self.layout), values, strict=True):
            vector[columns] = found
        return vector


def clustered(before: LayerClusters, deltas: Mapping[ClientId, Delta], number: int | None, most: int) -> LayerClusters:
    """Return new clusters of these clients, which all start from the mean over all clients.

    One tree of the mean distances; each layer's cut has the best silhouette of the layer's own distances, of those with
    at least as many clusters as the layer before.

    Args:
        deltas: each client's update of every target.
        number: of clusters in every layer, but at most one per client; None: by silhouette, at most `most`, and fewer
            than there are clients.
    """
    ids = sorted(deltas)
    levels = layers(before.layout)
    distances = [mean_distances([[deltas[id][target] for target in own] for id in ids]) for own, _ in levels]
    tree = cuts(np.mean(distances, axis=0), min(most, len(ids) - 1) if number is None else number)
    chosen = [0 if number is None else len(tree) - 1]
    for own in distances:
        chosen.append(chosen[-1] + best_cut(own, tree[chosen[-1] :]) if number is None else chosen[0])
    labels = {id: tuple(int(tree[cut][place]) for cut in chosen[1:]) for place, id in enumerate(ids)}
    root = before.own(None)
    states = [(root[columns],) * (cut + 1) for (_, columns), cut in zip(levels, chosen[1:], strict=True)]
    return LayerClusters(before.layout, labels, tuple(states))


@lru_cache(maxsize=16)
def layers(layout: Layout) -> tuple[tuple[tuple[int, ...], npt.NDArray[np.int64]], ...]:
    """Return the targets of each layer, and the places of their values in a vector."""
    targets: dict[str, list[int]] = {}
    for target, slot in enumerate(layout.slots[::2]):
        found = re.match(r"(.*?\.)?\d+(?=\.|$)", slot.module)
        targets.setdefault(found[0] if found else slot.module, []).append(target)
    ends = [*layout.offsets[::2], layout.size]
    return tuple(
        (tuple(own), np.concatenate([np.arange(ends[target], ends[target + 1]) for target in own]))
        for own in targets.values()
    )


def _placed(values: Vector) -> tuple[Places | None, Vector]:
    """Return where a vector has values (None: everywhere), and these."""
    held = ~np.isnan(values)
    return (None, values) if held.all() else (np.flatnonzero(held), values[held])
