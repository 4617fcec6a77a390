"""States are frozen dataclasses of arrays, numbers, and mappings or tuples of these: one traversal serves hashing,
saving, and counting bytes."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from fedray.adapters.layout import Layout
from fedray.storage.paths import StoragePath

Array = npt.NDArray[Any]
LEAVES = (type(None), np.ndarray, np.generic, bool, int, float, str)
Signature = tuple[tuple[str, str, tuple[int, ...]], ...]
"""Path, dtype and shape of every array of a payload."""


def leaves(state: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path, value) for every array, number, string and None of a state, in a fixed order. Layouts are left out,
    because they follow from the configuration.

    Raises:
        TypeError: the state holds something else; the message names its path.
    """
    children = _children(state, path)
    if children is None:
        yield path, state
        return
    for name, value in children:
        yield from leaves(value, f"{path}/{name}" if path else name)


def _children(state: Any, path: str = "") -> list[tuple[str, Any]] | None:
    """Return the named parts of a state, or None if it is a leaf."""
    kind: Any = type(state)
    parts = _parts_of(kind)
    if parts is None:
        raise TypeError(f"{path or 'state'}: a state holds arrays, numbers, mappings and tuples, not {kind.__name__}")
    return parts(state)


@lru_cache(maxsize=1024)
def _parts_of(kind: Any) -> Callable[[Any], list[tuple[str, Any]] | None] | None:
    """Return the function that lists the named parts of a state of this class; None if no state may have the class.
    Cached, because every payload asks several times."""
    if issubclass(kind, LEAVES):
        return lambda state: None
    if issubclass(kind, Layout):
        return lambda state: []
    if issubclass(kind, Mapping):
        return lambda state: sorted((str(key), value) for key, value in state.items())
    if issubclass(kind, tuple | list):
        return lambda state: [(str(index), value) for index, value in enumerate(state)]
    if not dataclasses.is_dataclass(kind):
        return None
    record: Any = kind
    names = field_names(record)
    return lambda state: [(name, getattr(state, name)) for name in names]


@lru_cache(maxsize=256)
def field_names(kind: Any) -> tuple[str, ...]:
    """Return the names of a dataclass's fields. Cached, because every payload asks for them."""
    return tuple(field.name for field in dataclasses.fields(kind))


def arrays(state: Any) -> dict[str, Array]:
    """Return the state's arrays by path, and its numbers as arrays of shape []; strings and None are left out."""
    return {
        path: np.asarray(value, order="C")
        for path, value in leaves(state)
        if value is not None and not isinstance(value, str)
    }


def signature_of(leaves: Iterable[tuple[str, Any]]) -> Signature:
    """Return the signature of a payload from its leaves."""
    return tuple((path, value.dtype.str, value.shape) for path, value in leaves if isinstance(value, np.ndarray))


def float_arrays(leaves: Iterable[tuple[str, Any]]) -> list[Array]:
    """Return the arrays of a payload that is averaged, from its leaves.

    Raises:
        TypeError: the payload holds something other than arrays of floats and None; the message names its path.
    """
    arrays = []
    for path, value in leaves:
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            arrays.append(value)
        elif value is not None:
            raise TypeError(f"{path}: a payload that is averaged has arrays of floats, not {type(value).__name__}")
    return arrays


def with_arrays(state: Any, arrays: Iterator[Array]) -> Any:
    """Return a copy of a state with its arrays replaced by `arrays`, in the order of `leaves`."""
    if isinstance(state, np.ndarray):
        return next(arrays)
    if isinstance(state, Mapping):
        replaced = {key: with_arrays(state[key], arrays) for key in sorted(state, key=str)}
        return {key: replaced[key] for key in state}
    if isinstance(state, tuple | list):
        parts = [with_arrays(part, arrays) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)
    if dataclasses.is_dataclass(state) and not isinstance(state, type | Layout):
        fields = {name: with_arrays(getattr(state, name), arrays) for name in field_names(type(state))}
        return type(state)(**fields)
    return state


def save_tensors(place: StoragePath, tensors: Mapping[str, Array], durable: bool = True) -> None:
    """Write arrays by name to a safetensors file, atomically.

    Raises:
        StorageError: the file could not be written.
    """
    place.write(save({name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}), durable)


def num_bytes(payload: Any) -> int:
    """Return the bytes of a payload's arrays, which is what travels. Single numbers and names are not counted."""
    if isinstance(payload, np.ndarray):
        return payload.nbytes
    return sum(num_bytes(part) for _, part in _children(payload) or ())


def sha256(states: Iterable[tuple[str, Any]]) -> str:
    """Return one hash over named states in the given order: over every path, dtype, shape and bit."""
    digest = hashlib.sha256()
    for name, state in states:
        for path, value in leaves(state):
            array = value if isinstance(value, np.ndarray) else None
            header = [name, path, str(array.dtype), array.shape] if array is not None else [name, path, repr(value)]
            digest.update(json.dumps(header).encode())
            if array is not None:
                digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
