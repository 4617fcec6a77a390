"""States as bytes and back; bytes from strangers."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from fedray.adapters.layout import Layout, Slot
from fedray.errors import StateError
from fedray.storage.codec import SHAPE, pack, pack_small, read_pack, unpack_small
from fedray.storage.state_tree import sha256
from fedray.types import STATE_TYPES, state_type


@state_type("test_codec.Inner", "test_codec.Old")
@dataclass(frozen=True)
class Inner:
    values: Any
    name: str | None = None


@state_type("test_codec.Outer")
@dataclass(frozen=True)
class Outer:
    by_client: Mapping[Any, Any]
    several: tuple[Any, ...]
    inner: Inner


@state_type("test_codec.Point")
@dataclass(frozen=True)
class Point:
    x: float
    y: float


@dataclass(frozen=True)
class Unknown:
    """Without a tag."""

    values: Any


NUMBERS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5))
ARRAYS = st.builds(
    lambda dtype, shape, seed: np.random.default_rng(seed).integers(0, 2, shape).astype(dtype),
    st.sampled_from([np.float32, np.float64, np.int64, np.uint8, np.bool_]),
    st.lists(st.integers(0, 3), max_size=3),
    st.integers(0, 9),
)
STATES = st.recursive(
    NUMBERS | ARRAYS | st.builds(np.float32, st.floats(width=32)),
    lambda part: st.one_of(
        st.dictionaries(st.text(max_size=3) | st.integers(), part, max_size=3),
        st.lists(part, max_size=3),
        st.lists(part, max_size=3).map(tuple),
        st.builds(Inner, part),
    ),
    max_leaves=8,
)


def unpack(blob: bytes) -> list[Any]:
    packed = read_pack(blob)
    return [packed.state(entry) for entry in range(len(packed.shape))]


def same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and sha256([("", one)]) == sha256([("", other)])


@given(st.lists(STATES, max_size=4))
def test_states_come_back_as_they_were(states: list[Any]) -> None:
    found = unpack(pack(states))
    assert len(found) == len(states)
    assert all(same(one, other) for one, other in zip(found, states, strict=True))


def test_types_keys_and_layouts_come_back() -> None:
    layout = Layout((Slot("layer.0", "A", (2, 3)), Slot("layer.0", "B", (3, 2))))
    values = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    state = Outer({3: 1.5, "x": (layout, [True, None])}, (np.float32(0.1), -0.0, float("nan")), Inner(values, "a"))
    (found,) = unpack(pack([state]))
    assert list(found.by_client) == [3, "x"]
    assert found.by_client["x"] == (layout, [True, None])
    assert type(found.several[0]) is np.float32
    assert str(found.several[1:]) == "(-0.0, nan)"
    assert np.array_equal(found.inner.values, values)
    with pytest.raises(ValueError, match="read-only"):
        found.inner.values[0, 0] = 1


def test_a_former_tag_is_read_and_the_present_one_is_written() -> None:
    old = '["class","test_codec.Old",[1,"a"]]'
    assert unpack_small(old) == Inner(1, "a")
    assert pack_small(Inner(1, "a")) == old.replace("Old", "Inner")


def test_a_subclass_needs_a_tag_of_its_own() -> None:
    @dataclass(frozen=True)
    class Derived(Inner):
        more: int = 0

    with pytest.raises(StateError, match=r"Derived; expected .* decorate it with @fedray.state_type"):
        pack_small(Derived(1))


def test_a_tag_belongs_to_one_dataclass() -> None:
    with pytest.raises(ValueError, match="Inner already has this tag"):
        state_type("test_codec.Inner")(Unknown)
    with pytest.raises(TypeError, match="str is not a dataclass"):
        state_type("test_codec.Text")(str)


@given(STATES)
def test_states_without_arrays_are_text_and_come_back(state: Any) -> None:
    text = pack_small(state)
    if text is not None:
        assert same(unpack_small(text), state)
    else:
        assert len(unpack(pack([state]))) == 1


def test_nobody_gets_an_object_that_somebody_else_may_change() -> None:
    text = pack_small({"a": [1]})
    packed = read_pack(pack([{"a": [np.ones(2)]}]))
    assert text is not None
    for read in (lambda: unpack_small(text), lambda: packed.state(0)):
        read()["a"].append(2)
        assert len(read()["a"]) == 1


@pytest.mark.parametrize(
    "text", ["", "[", "[[", '["map", 5]', '["empty", "<f4", [2]]', '["empty", "<f4", ["x", 0]]', '["array", "0"]']
)
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(StateError):
        unpack_small(text)


class Colour(StrEnum):
    RED = "red"


@pytest.mark.parametrize(
    "state",
    [
        Unknown(1),
        {"a": [object()]},
        {(1, 2): 3},
        {1.5: 2},
        {True: 1},
        len,
        Colour.RED,
        np.array(["a"]),
        np.array([None]),
        np.ones(2, np.complex64),
    ],
)
def test_what_cannot_be_read_back_is_not_written(state: Any) -> None:
    with pytest.raises(StateError, match=r"expected|holds"):
        pack([state])


def shaped(shape: Any, **tensors: Any) -> bytes:
    return bytes(save({SHAPE: np.frombuffer(json.dumps(shape).encode(), np.uint8), **tensors}))


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"\xff" * 100,
        save({"x": np.zeros(2)}),
        shaped({"a": 1}),
        shaped([["array", "7"]]),
        shaped([["class", "os.system", ["true"]]]),
        shaped([["class", "test_codec.Inner", [1, 2, 3]]]),
        shaped([["class", f"{Unknown.__module__}.Unknown", [1]]]),
        shaped([["magic"]]),
        shaped([[]]),
        shaped([["map", [[["array", "0"], 1]]]]),
        shaped([["map", 5]]),
        pack([{"a": np.ones(3)}])[:-1],
    ],
)
def test_other_bytes_are_refused_and_build_nothing(blob: bytes) -> None:
    with pytest.raises(StateError):
        unpack(blob)


def test_deep_nesting_is_refused() -> None:
    deep = "[" * 100_000 + "]" * 100_000
    blob = bytes(save({SHAPE: np.frombuffer(deep.encode(), np.uint8)}))
    with pytest.raises(StateError):
        unpack(blob)


@given(st.binary(max_size=200), st.integers(0, 10_000))
def test_any_bytes_are_read_or_refused(noise: bytes, at: int) -> None:
    """Noise, and good bytes with a piece of noise in them."""
    good = pack([Outer({"a": np.arange(4.0)}, (1,), Inner(None))])
    at %= len(good)
    for blob in (noise, good[:at] + noise + good[at + len(noise) :]):
        try:
            unpack(blob)
        except StateError:
            continue


def test_a_class_may_have_more_fields_than_were_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that were added since take their defaults; fewer fields, or new ones without a default, are an error."""
    saved = pack([Point(1.0, 2.0)])

    def read_as(fields: list[Any]) -> Any:
        cls = dataclasses.make_dataclass("Later", fields, frozen=True)
        monkeypatch.setitem(STATE_TYPES, "test_codec.Point", cls)
        return read_pack(saved).state(0)

    later = read_as([("x", float), ("y", float), ("name", str, dataclasses.field(default="none"))])
    assert (later.x, later.y, later.name) == (1.0, 2.0, "none")
    with pytest.raises(StateError, match=r"test_codec\.Point has 1 fields, and 2 were saved"):
        read_as([("x", float)])
    with pytest.raises(StateError, match="no state can be read from entry 0.*'z'"):
        read_as([("x", float), ("y", float), ("z", float)])
