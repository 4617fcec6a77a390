"""Checks for updates that must not reach an aggregate: not finite, of the wrong shape, far larger than the other
updates, or far away from them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedray.aggregation.points import BLOCK, lower_medians
from fedray.config.clients import UpdateChecks
from fedray.storage.state_tree import Array, Signature, leaves, signature_of
from fedray.types import ClientId, Vector

Expected = frozenset[Signature]
"""The signatures that a payload may have."""


def objection(found: Sequence[tuple[str, Any]], checks: UpdateChecks, expected: Expected | None) -> str | None:
    """Return why an update is not usable; None if it is usable.

    Args:
        found: the payload's `leaves`.
        expected: the allowed signatures; None allows any.
    """
    if checks.shape and expected is not None and (mine := signature_of(found)) not in expected:
        return f"wrong shape: {_difference(mine, min(expected))}"
    if checks.finite and (path := next((path for path, value in found if not finite(value)), None)) is not None:
        return f"not finite: {path}"
    return None


def outliers(payloads: Mapping[ClientId, Any], checks: UpdateChecks) -> dict[ClientId, str]:
    """Return the updates that are far larger than the others of a round or far away from them, and why. Updates that
    are too large are left out of the second comparison."""
    found: dict[ClientId, str] = {}
    if checks.norm is not None:
        found |= too_large(payloads, checks.norm)
    if checks.distance is not None:
        found |= too_far({id: payload for id, payload in payloads.items() if id not in found}, checks.distance)
    return found


def too_large(payloads: Mapping[ClientId, Any], bound: float) -> dict[ClientId, str]:
    """Return the updates whose root mean square is more than `bound` times the median, and why.

    Payloads without numbers are not compared; a median of 0 bounds nothing.
    """
    sizes = {id: size for id, payload in payloads.items() if (size := root_mean_square(payload)) is not None}
    median = float(np.median(list(sizes.values()))) if sizes else 0.0
    return {
        id: f"root mean square {size:.3g}, {size / median:.3g} times the median of the round (allowed: {bound:g})"
        for id, size in sizes.items()
        if median > 0 and not size <= bound * median
    }


def too_far(payloads: Mapping[ClientId, Any], bound: float) -> dict[ClientId, str]:
    """Return the updates whose distance from the coordinatewise median is more than `bound` times the median of the
    distances, and why."""
    return {
        id: f"distance {distance:.3g} from the median of the round, {times:.3g} times the others' (allowed: {bound:g})"
        for id, (distance, times) in distances(payloads).items()
        if not times <= bound
    }


def distances(payloads: Mapping[ClientId, Any]) -> dict[ClientId, tuple[float, float]]:
    """Return each update's distance from the coordinatewise median, and its ratio to the median distance.

    Only payloads of the same signature are compared. A signature is left out if fewer than three payloads have it,
    because then no majority says which one is far away, or if the median distance is 0.
    """
    alike: dict[Signature, dict[ClientId, Vector]] = {}
    for id, payload in payloads.items():
        found = list(leaves(payload))
        alike.setdefault(signature_of(found), {})[id] = _flat(found)
    away: dict[ClientId, tuple[float, float]] = {}
    for vectors in (vectors for vectors in alike.values() if len(vectors) > 2):
        points = np.stack(list(vectors.values()))
        lengths = np.linalg.norm(points - lower_medians(points, BLOCK), axis=1)
        if (median := float(np.median(lengths))) > 0:
            away |= {id: (length, length / median) for id, length in zip(vectors, lengths.tolist(), strict=True)}
    return away


def _flat(found: Sequence[tuple[str, Any]]) -> Vector:
    """Return all floating-point numbers of a payload, [d]."""
    arrays = [value.reshape(-1) for _, value in found if isinstance(value, np.ndarray) and value.dtype.kind == "f"]
    return np.concatenate(arrays, dtype=np.float32) if arrays else np.zeros(0, np.float32)


def root_mean_square(payload: Any) -> float | None:
    """Return the root mean square of a payload's floating-point numbers, in float64; None if it has none."""
    arrays = [value for _, value in leaves(payload) if isinstance(value, np.ndarray) and value.dtype.kind == "f"]
    count = sum(array.size for array in arrays)
    if not count:
        return None
    return float(np.sqrt(sum(float(np.square(array, dtype=np.float64).sum()) for array in arrays) / count))


def finite(value: Array | float | str | None) -> bool:
    """Return whether a value is finite. One pass over an array suffices unless its sum of squares overflows."""
    if isinstance(value, float):
        return math.isfinite(value)
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        return True
    flat = value.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        return math.isfinite(flat @ flat) or bool(np.isfinite(flat).all())


def _difference(mine: Signature, other: Signature) -> str:
    """Return a description of the first array that differs."""
    ours, theirs = ({path: (dtype, shape) for path, dtype, shape in one} for one in (mine, other))
    path = next(path for path in sorted({*ours, *theirs}) if ours.get(path) != theirs.get(path))
    return f"{path} is {_named(ours.get(path))}, expected {_named(theirs.get(path))}"


def _named(array: tuple[str, Sequence[int]] | None) -> str:
    return "absent" if array is None else f"{array[0]} {list(array[1])}"
