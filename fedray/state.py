"""States are frozen dataclasses of arrays, numbers, and mappings or tuples of these: one walk serves hashing, saving,
and counting bytes."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fedray.adapters.layout import Layout

Array = npt.NDArray[Any]


def leaves(state: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path, value) for every array, number, string and None of a state, in a fixed order. Layouts are left out:
    they follow from the configuration.

    Raises:
        TypeError: something else is in it; the message names its path.
    """
    if isinstance(state, Layout):
        return
    if dataclasses.is_dataclass(state) and not isinstance(state, type):
        children = [(field.name, getattr(state, field.name)) for field in dataclasses.fields(state)]
    elif isinstance(state, Mapping):
        children = sorted((str(key), value) for key, value in state.items())
    elif isinstance(state, tuple | list):
        children = [(str(index), value) for index, value in enumerate(state)]
    elif state is None or isinstance(state, np.ndarray | np.generic | bool | int | float | str):
        yield path, state
        return
    else:
        raise TypeError(
            f"{path or 'state'}: a state holds arrays, numbers, mappings and tuples, not {type(state).__name__}"
        )
    for name, value in children:
        yield from leaves(value, f"{path}/{name}" if path else name)


def arrays(state: Any) -> dict[str, Array]:
    """Return the state's arrays by path, numbers as arrays of shape []; strings and None are left out."""
    return {
        path: np.asarray(value, order="C")
        for path, value in leaves(state)
        if value is not None and not isinstance(value, str)
    }


def num_bytes(payload: Any) -> int:
    """Return the bytes of a payload's arrays: what travels. Numbers and names beside them are not counted."""
    return sum(value.nbytes for _, value in leaves(payload) if isinstance(value, np.ndarray))


def sha256(states: Mapping[str, Any]) -> str:
    """Return one hash over states by name: every path, type, shape and bit."""
    digest = hashlib.sha256()
    for name in sorted(states):
        for path, value in leaves(states[name]):
            array = value if isinstance(value, np.ndarray) else None
            header = [name, path, str(array.dtype), array.shape] if array is not None else [name, path, repr(value)]
            digest.update(json.dumps(header).encode())
            if array is not None:
                digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
