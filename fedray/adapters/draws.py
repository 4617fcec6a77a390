"""Initial values of an adapter's groups. Each slot has its own stream, keyed by (seed, purpose, ..., slot name): a draw
depends neither on the other slots nor on any global generator."""

import math
from collections.abc import Callable, Collection

import numpy as np
import numpy.typing as npt

from fedray.adapters.layout import Layout, Slot
from fedray.randomness import Key, keyed_rng
from fedray.types import Vector

Matrix = npt.NDArray[np.float64]


def draw_lora(layout: Layout, seed: int, purpose: str = "lora", *key: Key) -> Vector:
    """Return A ~ U(−1/√d_in, 1/√d_in), which is Kaiming-uniform with a = √5, and B = 0."""

    def draw(slot: Slot) -> Matrix:
        if slot.part == "B":
            return np.zeros(slot.shape)
        return _uniform(slot, slot.shape[-1], seed, purpose, *key)

    return _filled(layout, draw)


def draw_mixer(layout: Layout, seed: int, purpose: str = "mixer", *key: Key) -> Vector:
    """Return G ~ U(−1/√d_in, 1/√d_in), Kaiming-uniform with a = √5 (FedALT), w_R = w_L = 1, and present = 0."""

    def draw(slot: Slot) -> Matrix:
        if slot.part == "G":
            return _uniform(slot, slot.shape[-1], seed, purpose, *key)
        return np.full(slot.shape, float(slot.part != "present"))

    return _filled(layout, draw)


def draw_frames(layout: Layout, seed: int, purpose: str = "frames", *key: Key) -> Vector:
    """Return A with orthonormal rows and B with orthonormal columns, uniform. The first r_k components are the draw of
    a layout of rank r_k."""

    def draw(slot: Slot) -> Matrix:
        wide = slot.shape if slot.part == "A" else slot.shape[::-1]
        rows = _orthonormal(keyed_rng(seed, purpose, *key, slot.name).normal(size=wide).T)
        return rows.T if slot.part == "A" else rows

    return _filled(layout, draw)


def draw_zeros(layout: Layout, seed: int) -> Vector:
    """Return zeros."""
    return np.zeros(layout.size, np.float32)


def draw_reft(layout: Layout, seed: int, purpose: str = "reft", *key: Key) -> Vector:
    """Return R uniform on the Stiefel manifold, and W, b, P ~ U(−1/√d, 1/√d) as nn.Linear's."""
    widths = {slot.module: slot.shape[-1] for slot in layout.slots if slot.part == "W"}

    def draw(slot: Slot) -> Matrix:
        if slot.part == "R":
            return _orthonormal_rows(slot, seed, purpose, *key)
        return _uniform(slot, widths[slot.module], seed, purpose, *key)

    return _filled(layout, draw)


def draw_head(layout: Layout, kept: Vector, missing: Collection[str], seed: int, std: float) -> Vector:
    """Return the head `kept` with the tensors that the checkpoint did not have drawn: matrices ~ N(0, std²), biases 0,
    weights of normalisation layers 1.

    Args:
        kept: [layout.size], the values of the tensors that the checkpoint has.
        missing: names of the parameters that it lacks (`fedray.models.backbone.missing_head`).
        std: the model configuration's initializer_range.
    """
    vector = kept.copy()
    for slot, view in layout.items(vector):
        if slot.module not in missing:
            continue
        if len(slot.shape) == 1:
            view[...] = slot.module.endswith(".weight")
        else:
            view[...] = keyed_rng(seed, "head", slot.name).normal(0, std, slot.shape)
    return vector


def _filled(layout: Layout, draw: Callable[[Slot], Matrix]) -> Vector:
    return layout.flatten({slot.name: draw(slot) for slot in layout.slots})


def _uniform(slot: Slot, fan_in: int, seed: int, purpose: str, *key: Key) -> Matrix:
    bound = 1 / math.sqrt(fan_in)
    return keyed_rng(seed, purpose, *key, slot.name).uniform(-bound, bound, slot.shape)


def _orthonormal_rows(slot: Slot, seed: int, purpose: str, *key: Key) -> Matrix:
    """[r, d]: Q of a Gaussian's QR decomposition, signs fixed so that it is uniform (Mezzadri 2007)."""
    return _orthonormal(keyed_rng(seed, purpose, *key, slot.name).normal(size=slot.shape[::-1])).T


def _orthonormal(gaussian: Matrix) -> Matrix:
    """Return [d, r] orthonormal columns, uniform for a Gaussian [d, r]."""
    q, r = np.linalg.qr(gaussian)
    return np.asarray(q * np.sign(np.diag(r)))
