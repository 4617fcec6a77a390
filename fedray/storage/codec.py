"""Converts states to bytes and back: safetensors for the arrays, JSON for the structure that holds them, and no pickle.

A state's classes are registered under stable tags (`fedray.types.state_type`). Untrusted bytes can therefore create
nothing else, and classes may be renamed and moved.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedray.errors import StateError
from fedray.storage.state_tree import field_names
from fedray.types import STATE_TAG, STATE_TYPES

_as_json = json.JSONEncoder(separators=(",", ":")).encode

SHAPE = "shape"
"""Name of the tensor that holds the JSON."""


def pack_small(state: Any) -> str | None:
    """Return a state as text, or None if it has an array that is not empty.

    Raises:
        StateError: as `pack`.
    """
    tensors: dict[str, Any] = {}
    shape = _taken_apart(state, tensors)
    return None if tensors else _as_json(shape)


def unpack_small(text: str) -> Any:
    """Return the state that `pack_small` turned into text.

    Raises:
        StateError: as `StatePack.state`.
    """
    with _reading(f"the text {text[:100]!r}"):
        return _put_together(_parsed(text), {})


def pack(states: Sequence[Any]) -> bytes:
    """Return states as bytes.

    Raises:
        StateError: a state holds something other than arrays of numbers, numbers, strings, None, mappings with strings
            or integers as keys, tuples, lists and registered dataclasses.
    """
    tensors: dict[str, Any] = {}
    shape = [_taken_apart(state, tensors) for state in states]
    for key, tensor in tensors.items():
        tensors[key] = np.asarray(tensor, order="C")
        if tensors[key].dtype.kind not in "fiub" or tensors[key].dtype.itemsize > 8:
            raise StateError(f"a state holds an array of {tensors[key].dtype}; expected numbers or truth values")
    return bytes(save({SHAPE: np.frombuffer(_as_json(shape).encode(), np.uint8), **tensors}))


@dataclass(frozen=True)
class StatePack:
    """Parsed bytes of `pack`. The objects of a state are created anew by every call of `state`.

    Attributes:
        shape: each state as JSON values.
        tensors: the arrays by their keys in `shape`.
    """

    shape: Sequence[Any]
    tensors: Mapping[str, Any]

    def state(self, entry: int) -> Any:
        """Return one of the states; its arrays are read-only.

        Raises:
            StateError: the entry is not a state of registered dataclasses.
        """
        with _reading(f"entry {entry}"):
            return _put_together(self.shape[entry], self.tensors)


def read_pack(blob: bytes) -> StatePack:
    """Parse the bytes that `pack` returned.

    Raises:
        StateError: `pack` did not write these bytes.
    """
    with _reading(f"these {len(blob)} bytes"):
        tensors = load(blob)
        shape = json.loads(tensors.pop(SHAPE).tobytes())
        if not isinstance(shape, list):
            raise StateError(f"expected a list of states, got {type(shape).__name__}")
        for tensor in tensors.values():
            tensor.flags.writeable = False
        return StatePack(shape, tensors)


@contextmanager
def _reading(what: str) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, LookupError, ValueError, TypeError, RecursionError) as error:
        raise StateError(f"no state can be read from {what}: {error}") from error


_parsed = lru_cache(maxsize=256)(json.loads)
"""Cached, because states without arrays are often equal for all clients."""


def _taken_apart(state: Any, tensors: dict[str, Any]) -> Any:
    """Return the state as JSON values, and put its arrays into `tensors`. Plain values stand for themselves; anything
    else becomes a list that begins with its kind."""
    if state is None or type(state) in (bool, int, float, str):
        return state
    if isinstance(state, np.ndarray) and not state.size:
        return ["empty", state.dtype.str, list(state.shape)]
    if isinstance(state, np.ndarray | np.generic):
        key = str(len(tensors))
        tensors[key] = state
        return ["array" if isinstance(state, np.ndarray) else "scalar", key]
    if isinstance(state, Mapping):
        for key in state:
            if type(key) not in (str, int):
                raise StateError(f"a state's mapping has the key {key!r}; expected a string or a whole number")
        return ["map", [[key, _taken_apart(value, tensors)] for key, value in state.items()]]
    if type(state) in (tuple, list):
        return [type(state).__name__, [_taken_apart(part, tensors) for part in state]]
    cls: Any = type(state)
    if (tag := vars(cls).get(STATE_TAG)) is None:
        raise StateError(
            f"a state holds a {cls.__module__}.{cls.__qualname__}; expected arrays, numbers, mappings, tuples, and "
            "dataclasses with a tag: decorate it with @fedray.state_type('NAME')"
        )
    parts = [_taken_apart(getattr(state, field), tensors) for field in field_names(cls)]
    return ["class", tag, parts]


def _put_together(part: Any, tensors: Mapping[str, Any]) -> Any:
    if not isinstance(part, list):
        return part
    kind, *rest = part
    if kind in ("array", "scalar"):
        (key,) = rest
        return tensors[key] if kind == "array" else tensors[key][()]
    if kind == "empty":
        dtype, shape = rest
        if 0 not in shape or any(type(size) is not int for size in shape):
            raise StateError(f"an empty array cannot have the shape {shape}")
        return np.zeros(shape, np.dtype(dtype))
    if kind == "map":
        (entries,) = rest
        return {key: _put_together(value, tensors) for key, value in entries}
    if kind in ("tuple", "list"):
        (entries,) = rest
        parts = [_put_together(entry, tensors) for entry in entries]
        return tuple(parts) if kind == "tuple" else parts
    if kind != "class":
        raise StateError(f"unknown kind {kind!r}")
    tag, entries = rest
    if tag not in STATE_TYPES:
        raise StateError(f"no class has the tag {tag!r}")
    parts = [_put_together(entry, tensors) for entry in entries]
    cls: Any = STATE_TYPES[tag]
    names = field_names(cls)
    if len(parts) > len(names):
        raise StateError(f"{tag} has {len(names)} fields, and {len(parts)} were saved")
    return cls(**dict(zip(names, parts, strict=False)))  # fields that were added since have defaults
