"""Flat state: tensors into one vector and back, bit for bit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedray.adapters.layout import Layout, Slot

# A: 2 x 3 at 0 to 5, B: 2 at 6 to 7, G: a scalar at 8.
LAYOUT = Layout((Slot("layer.0", "A", (2, 3)), Slot("layer.0", "B", (2,)), Slot("head", "G", ())))
TENSORS = {
    "layer.0.A": np.array([[0, 1, 2], [3, 4, 5]], dtype=np.float32),
    "layer.0.B": np.array([6, 7], dtype=np.float32),
    "head.G": np.array(8, dtype=np.float32),
}


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Layouts with scalars, empty tensors, and a part of every kind."""
    places = draw(
        st.lists(st.tuples(st.sampled_from("xyz"), st.sampled_from("ABRWbPG")), unique=True, min_size=0, max_size=6)
    )
    shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
    return Layout(tuple(Slot(f"model.{module}", part, draw(shapes)) for module, part in places))


@st.composite
def layouts_with_tensors(draw: st.DrawFn) -> tuple[Layout, dict[str, np.ndarray]]:
    layout = draw(layouts())
    floats = st.floats(width=32, allow_nan=True, allow_infinity=True)
    return layout, {slot.name: draw(hnp.arrays(np.float32, slot.shape, elements=floats)) for slot in layout.slots}


def test_offsets_and_order_by_hand() -> None:
    assert LAYOUT.size == 9
    assert LAYOUT.offsets == (0, 6, 8)
    vector = LAYOUT.flatten(TENSORS)
    assert vector.dtype == np.float32
    assert vector.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert LAYOUT.flatten(dict(reversed(TENSORS.items()))).tolist() == vector.tolist()


def test_views_write_to_the_vector() -> None:
    vector = LAYOUT.flatten(TENSORS)
    views = LAYOUT.views(vector)
    views["layer.0.A"][1, 0] = 30
    views["head.G"][...] = 80
    assert vector.tolist() == [0, 1, 2, 30, 4, 5, 6, 7, 80]


def test_flatten_copies() -> None:
    LAYOUT.flatten(TENSORS)[:] = -1
    assert TENSORS["layer.0.A"][0].tolist() == [0, 1, 2]


def test_flatten_reads_tensors_that_are_not_contiguous() -> None:
    columns_first = {**TENSORS, "layer.0.A": np.asfortranarray(TENSORS["layer.0.A"])}
    assert LAYOUT.flatten(columns_first).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]


def test_mask_by_hand() -> None:
    assert LAYOUT.mask({"B", "G"}).tolist() == [False] * 6 + [True] * 3
    assert LAYOUT.mask({"R"}).tolist() == [False] * 9
    assert Layout(()).mask({"A"}).tolist() == []


@given(layouts_with_tensors())
def test_there_and_back_bit_for_bit(case: tuple[Layout, dict[str, np.ndarray]]) -> None:
    """Compared as integers: NaN payloads and the sign of zero count."""
    layout, tensors = case
    vector = layout.flatten(tensors)
    views = layout.views(vector)
    assert list(views) == [slot.name for slot in layout.slots]
    for name, tensor in tensors.items():
        assert views[name].shape == tensor.shape
        assert np.array_equal(views[name].view(np.uint32), tensor.view(np.uint32))
    assert np.array_equal(layout.flatten(views).view(np.uint32), vector.view(np.uint32))


@given(layouts())
def test_slots_tile_the_vector(layout: Layout) -> None:
    """Numbering the vector's places and reading them slot by slot gives 0, 1, 2, ... without gap or overlap."""
    places = np.arange(layout.size, dtype=np.float32)
    read = [value for _, view in layout.items(places) for value in view.reshape(-1).tolist()]
    assert read == list(range(layout.size))
    masks = [layout.mask({part}) for part in ("A", "B", "R", "W", "b", "P", "G", "tensor")]
    assert np.array_equal(np.sum(masks, axis=0), np.ones(layout.size))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer.0.R": np.zeros(2)}, r"tensors without a slot: \['layer\.0\.R'\]"),
        ({"layer.0.A": np.zeros((3, 2))}, r"slot 'layer\.0\.A' has shape \(2, 3\), the tensor \(3, 2\)"),
        ({"head.G": np.zeros(1)}, r"slot 'head\.G' has shape \(\), the tensor \(1,\)"),
    ],
)
def test_flatten_refuses_what_does_not_fit(change: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LAYOUT.flatten(TENSORS | change)


def test_flatten_refuses_a_missing_tensor() -> None:
    with pytest.raises(ValueError, match=r"no tensor for slot 'layer\.0\.B'"):
        LAYOUT.flatten({name: tensor for name, tensor in TENSORS.items() if name != "layer.0.B"})


@pytest.mark.parametrize("shape", [(8,), (10,), (9, 1), (3, 3), ()])
def test_views_refuse_another_length(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="9 values"):
        LAYOUT.views(np.zeros(shape, dtype=np.float32))


def test_equal_slots_make_equal_layouts() -> None:
    """Layouts are compared and used as keys by value; two processes build their own."""
    again = Layout(tuple(Slot(slot.module, slot.part, slot.shape) for slot in LAYOUT.slots))
    assert again == LAYOUT
    assert hash(again) == hash(LAYOUT)
    assert Layout(LAYOUT.slots[::-1]) != LAYOUT
