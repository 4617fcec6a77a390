"""Updates that must not reach an aggregate: not finite, of another shape, or far larger than everybody else's."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedray.config.clients import UpdateChecks
from fedray.state import Array, Signature, leaves, signature_of
from fedray.types import ClientId

Expected = frozenset[Signature]
"""The signatures that a payload may have."""


def objection(payload: Any, checks: UpdateChecks, expected: Expected | None) -> str | None:
    """Return why an update is not usable; None if it is.

    expected: None: any.
    """
    found = list(leaves(payload))
    if checks.shape and expected is not None and (mine := signature_of(found)) not in expected:
        return f"wrong shape: {_difference(mine, min(expected))}"
    if checks.finite and (path := next((path for path, value in found if not finite(value)), None)) is not None:
        return f"not finite: {path}"
    return None


def outliers(payloads: Mapping[ClientId, Any], bound: float) -> dict[ClientId, str]:
    """Return those whose root mean square is more than `bound` times the median, and why.

    A payload without numbers has none, and is left out; a median of 0 bounds nothing.
    """
    sizes = {id: size for id, payload in payloads.items() if (size := root_mean_square(payload)) is not None}
    median = float(np.median(list(sizes.values()))) if sizes else 0.0
    return {
        id: f"root mean square {size:.3g}, {size / median:.3g} times the median of the round (allowed: {bound:g})"
        for id, size in sizes.items()
        if median > 0 and not size <= bound * median
    }


def root_mean_square(payload: Any) -> float | None:
    """Return that of all its floating-point numbers, in float64; None where there are none."""
    arrays = [value for _, value in leaves(payload) if isinstance(value, np.ndarray) and value.dtype.kind == "f"]
    count = sum(array.size for array in arrays)
    if not count:
        return None
    return float(np.sqrt(sum(float(np.square(array, dtype=np.float64).sum()) for array in arrays) / count))


def finite(value: Array | float | str | None) -> bool:
    """One pass over the values; a sum that overflows is looked at again."""
    if isinstance(value, float):
        return bool(np.isfinite(value))
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        return True
    flat = value.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(flat @ flat) or np.isfinite(flat).all())


def _difference(mine: Signature, other: Signature) -> str:
    """Return the first array that differs."""
    ours, theirs = ({path: (dtype, shape) for path, dtype, shape in one} for one in (mine, other))
    path = next(path for path in sorted({*ours, *theirs}) if ours.get(path) != theirs.get(path))
    return f"{path} is {_named(ours.get(path))}, expected {_named(theirs.get(path))}"


def _named(array: tuple[str, Sequence[int]] | None) -> str:
    return "absent" if array is None else f"{array[0]} {list(array[1])}"
