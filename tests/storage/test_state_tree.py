"""One walk over states: what it finds, what it counts, and when two states have the same hash."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedray.adapters.layout import Layout, Slot
from fedray.storage.state_tree import arrays, leaves, num_bytes, sha256


@dataclass(frozen=True)
class Inner:
    values: Any
    name: str = "x"


@dataclass(frozen=True)
class Outer:
    number: int
    inner: Any
    by_client: Any
    several: Any
    nothing: None = None


def example(**changes: Any) -> Outer:
    state = Outer(
        number=3,
        inner=Inner(np.arange(6, dtype=np.float32).reshape(2, 3)),
        by_client={"b": np.array([1, 2], np.int16), "a": np.float64(0.5)},
        several=(np.zeros((), np.float32), True),
    )
    return replace(state, **changes)


def test_leaves_come_by_path_fields_in_order_and_keys_sorted() -> None:
    assert [path for path, _ in leaves(example())] == [
        "number",
        "inner/values",
        "inner/name",
        "by_client/a",
        "by_client/b",
        "several/0",
        "several/1",
        "nothing",
    ]


def test_layouts_are_left_out() -> None:
    layout = Layout((Slot("q", "A", (2, 3)),))
    assert list(leaves({"a": 1, "layout": layout})) == [("a", 1)]


@pytest.mark.parametrize("foreign", [{1, 2}, object(), b"bytes", Inner])
def test_other_things_are_refused_by_their_path(foreign: Any) -> None:
    with pytest.raises(TypeError, match=f"by_client/a/1: a state holds .*, not {type(foreign).__name__}"):
        list(leaves(example(by_client={"a": (1, foreign)})))
    with pytest.raises(TypeError, match="^state: "):
        list(leaves(foreign))


def test_arrays_keep_type_and_shape_and_leave_out_words() -> None:
    found = arrays(example())
    assert {path: (x.dtype.name, x.shape) for path, x in found.items()} == {
        "number": ("int64", ()),
        "inner/values": ("float32", (2, 3)),
        "by_client/a": ("float64", ()),
        "by_client/b": ("int16", (2,)),
        "several/0": ("float32", ()),
        "several/1": ("bool", ()),
    }
    turned = arrays(example(several=(np.arange(6).reshape(2, 3).T,)))["several/0"]
    assert turned.flags.c_contiguous
    assert turned.tolist() == [[0, 3], [1, 4], [2, 5]]


def test_bytes_are_those_of_arrays() -> None:
    """2·3 float32, two int16 and one float32 of shape []: 24 + 4 + 4. Numbers beside arrays are not counted."""
    assert num_bytes(example()) == 32
    assert num_bytes(None) == num_bytes(7) == num_bytes("text") == 0
    assert num_bytes({"half": np.zeros(5, np.int16), "bits": np.zeros(3, np.uint8)}) == 13


def digest(state: Any) -> str:
    return sha256([("server", state)])


def test_equal_states_have_equal_hashes() -> None:
    assert digest(example()) == digest(example())
    backwards = dict(reversed(example().by_client.items()))
    assert list(backwards) != list(example().by_client)
    assert digest(example(by_client=backwards)) == digest(example())
    turned = np.asfortranarray(example().inner.values)
    assert digest(example(inner=Inner(turned))) == digest(example())
    assert digest(example(several=list(example().several))) == digest(example())


@given(index=st.integers(0, 5), bit=st.integers(0, 31))
def test_every_bit_counts(index: int, bit: int) -> None:
    values = example().inner.values.copy()
    values.view(np.uint32).reshape(-1)[index] ^= np.uint32(1 << bit)
    assert digest(example(inner=Inner(values))) != digest(example())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (np.array([0.0]), np.array([-0.0])),
        (np.array([1, 2], np.int32), np.array([1, 2], np.int64)),
        (np.zeros(4, np.float32), np.zeros(4, np.int32)),
        (np.zeros((2, 3)), np.zeros((3, 2))),
        (np.zeros(1), np.zeros(())),
        (1, True),
        (1, 1.0),
        (1, "1"),
        (None, "None"),
        (0, None),
        (np.float32(1), np.float64(1)),
        ({"a": 1}, {"b": 1}),
        ((np.array([1, 2]), np.array([3])), (np.array([1]), np.array([2, 3]))),
        (({"a": 1}, {}), ({}, {"a": 1})),
        (Inner(1, "x"), Inner(1, "y")),
        ((1, 2), (2, 1)),
    ],
)
def test_what_differs_has_another_hash(one: Any, other: Any) -> None:
    assert digest(one) != digest(other)


def test_the_names_of_the_states_count() -> None:
    assert sha256([("client/a", 1)]) != sha256([("client/b", 1)])
    assert sha256([("a", 1), ("b", 2)]) != sha256([("a", 2), ("b", 1)])
