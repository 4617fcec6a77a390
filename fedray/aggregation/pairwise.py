"""Weighted means whose bits do not depend on which process averages which points, or when.

Leaf k of n has a fixed position in a binary tree: leaves 2i and 2i + 1 are averaged, then their means in pairs, and so
on; a missing leaf is empty, and a node without a sibling passes up unchanged. Any process that holds two siblings may
average them, so any split of the leaves among actors, in any order, gives the same float32 bits. Rounding errors grow
with log2 n, as in pairwise summation (Higham, SIAM J. Sci. Comput. 14, 1993), and the mean of equal vectors is exact.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedray.types import Vector

BLOCK = 65_536
"""Values that are averaged at a time: the intermediate steps stay in the processor's cache."""

HALF = np.float32(0.5)


class Node(NamedTuple):
    """The weighted mean of the leaves from place · 2^level on, at most 2^level of them.

    Attributes:
        weight: the sum of the leaves' weights.
        leaves: number of leaves.
        own: whether the arrays may be written to.
    """

    level: int
    place: int
    weight: float
    leaves: int
    arrays: tuple[Vector, ...]
    own: bool = False


def leaf(position: int, weight: float, arrays: Sequence[Vector]) -> Node:
    """Return a leaf.

    Raises:
        ValueError: the weight is negative or not finite.
    """
    if not 0 <= weight < np.inf:
        raise ValueError(f"expected a finite weight >= 0, got {weight}")
    return Node(0, position, weight, 1, tuple(np.asarray(array, order="C") for array in arrays))


class PairwiseMean:
    """Averages nodes as soon as their siblings have been added."""

    def __init__(self) -> None:
        self._nodes: dict[tuple[int, int], Node] = {}

    def add(self, node: Node) -> None:
        """Add a node, none of whose leaves was added before.

        Raises:
            ValueError: its arrays have other shapes or types than those it is averaged with.
        """
        while (sibling := self._nodes.pop((node.level, node.place ^ 1), None)) is not None:
            node = _parent(*((sibling, node) if node.place & 1 else (node, sibling)))
        self._nodes[node.level, node.place] = node

    def take(self) -> tuple[Node, ...]:
        """Return the remaining nodes, to be added elsewhere, and forget them."""
        nodes, self._nodes = self._nodes.values(), {}
        return tuple(node._replace(own=False) for node in nodes)

    def total(self) -> Node | None:
        """Return the mean of all added leaves; None if there are none. Nothing can be added afterwards.

        Raises:
            ValueError: all weights are zero.
        """
        while len(self._nodes) > 1:
            alone = self._nodes.pop(min(self._nodes))
            self.add(alone._replace(level=alone.level + 1, place=alone.place // 2))
        node = next(iter(self._nodes.values()), None)
        if node is not None and node.weight == 0:
            raise ValueError("all weights are zero")
        return node


def _parent(left: Node, right: Node) -> Node:
    if not all(map(_alike, left.arrays, right.arrays)) or len(left.arrays) != len(right.arrays):
        shapes, others = ([(array.shape, array.dtype) for array in node.arrays] for node in (left, right))
        raise ValueError(f"shapes differ: {shapes} and {others}")
    weight, leaves = left.weight + right.weight, left.leaves + right.leaves
    if not left.weight or not right.weight:  # a weight of zero must not even change the rounding
        counted = left if left.weight else right
        return counted._replace(level=left.level + 1, place=left.place // 2, leaves=leaves)
    share = np.float32(right.weight / weight)
    arrays = []
    for one, other in zip(left.arrays, right.arrays, strict=True):
        mean = one if left.own else other if right.own else np.empty_like(one)
        if mean.size <= BLOCK:
            _between(one, other, share, mean)
        else:
            for start in range(0, mean.size, BLOCK):
                part = slice(start, start + BLOCK)
                _between(one.reshape(-1)[part], other.reshape(-1)[part], share, mean.reshape(-1)[part])
        arrays.append(mean)
    return Node(left.level + 1, left.place // 2, weight, leaves, tuple(arrays), own=True)


def _alike(one: Vector, other: Vector) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype


def _between(one: Vector, other: Vector, share: np.float32, out: Vector) -> None:
    """Write one + share · (other − one) to `out`, which may be one of them."""
    if share == HALF:
        np.add(one, other, out=out)
        out *= HALF
        return
    step = other - one
    step *= share
    np.add(one, step, out=out)
