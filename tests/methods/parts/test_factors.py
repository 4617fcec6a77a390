"""LoRA vectors as low-rank matrices, and masked rows: there and back bit for bit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedray.adapters.layout import Layout, Slot
from fedray.methods.parts.factors import join, keep_rows, pack_masks, receive, split, unpack_masks, zero


def lora_layout(shapes, rank):
    """One target per (d_out, d_in)."""
    slots = []
    for index, (d_out, d_in) in enumerate(shapes):
        slots += [Slot(f"layer.{index}", "A", (rank, d_in)), Slot(f"layer.{index}", "B", (d_out, rank))]
    return Layout(tuple(slots))


def test_split_knows_which_factor_is_which():
    """A [1, 2] = (1, 2), B [3, 1] = (3, 4, 5): B A has rows (3, 6), (4, 8), (5, 10). Views: nothing is copied."""
    vector = np.array([1, 2, 3, 4, 5], np.float32)
    (delta,) = split(lora_layout([(3, 2)], 1), vector)
    assert delta.dense().tolist() == [[3, 6], [4, 8], [5, 10]]
    delta.B[0, 0] = 30
    assert vector[2] == 30


def test_split_wants_a_lora():
    layout = Layout((Slot("x", "B", (3, 1)), Slot("x", "A", (1, 2))))
    with pytest.raises(ValueError, match=r"expected slots A, B for each target, got \['B', 'A'\]"):
        split(layout, np.zeros(5, np.float32))


def test_zero_has_the_layouts_outer_shapes_and_no_columns():
    deltas = zero(lora_layout([(3, 2), (5, 4)], 2))
    assert [(delta.shape, delta.rank) for delta in deltas] == [((3, 2), 0), ((5, 4), 0)]


def test_kept_rows_by_hand():
    """Rank 1: A (1, 2), B (3, 4, 5) with rows 0 and 2 kept: 1, 2, 3, 5 travel; row 1 comes back as zero. The bitset's
    first row is its highest bit: 101 is 0b10100000."""
    layout = lora_layout([(3, 2)], 1)
    masks = (np.array([True, False, True]),)
    sent = join(keep_rows(split(layout, np.array([1, 2, 3, 4, 5], np.float32)), masks))
    assert sent.dtype == np.float32
    assert sent.tolist() == [1, 2, 3, 5]
    (received,) = receive(layout, sent, masks)
    assert received.dense().tolist() == [[3, 6], [0, 0], [5, 10]]
    bits = pack_masks(masks)
    assert bits is not None
    assert bits.tolist() == [0b10100000]


@given(
    shapes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 5)), min_size=1, max_size=4),
    rank=st.integers(1, 4),
    data=st.data(),
)
def test_there_and_back(shapes, rank, data):
    """Also with bitsets that do not fill their bytes (d_out up to 20) and masks that keep nothing or everything."""
    layout = lora_layout(shapes, rank)
    masks = tuple(np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)), bool) for n, _ in shapes)
    vector = np.random.default_rng(len(shapes)).normal(size=layout.size).astype(np.float32)
    deltas = split(layout, vector)
    assert np.array_equal(join(deltas), vector)
    bits = pack_masks(masks)
    assert (bits is None) == all(mask.all() for mask in masks)
    if bits is not None:
        assert bits.nbytes == sum(-(-d_out // 8) for d_out, _ in shapes)
    for mask, again in zip(masks, unpack_masks(layout, bits), strict=True):
        assert np.array_equal(mask, again)
    sent = join(keep_rows(deltas, masks))
    assert sent.size == sum(rank * (d_in + int(m.sum())) for (_, d_in), m in zip(shapes, masks, strict=True))
    for delta, mask, received in zip(deltas, masks, receive(layout, sent, masks), strict=True):
        assert np.array_equal(received.A, delta.A)
        assert np.array_equal(received.B, np.where(mask[:, None], delta.B, 0))


@pytest.mark.parametrize("size", [3, 5])
def test_factors_that_do_not_fit_their_masks(size):
    """A (2 values) and two kept rows of rank 1 are four values."""
    masks = (np.array([True, False, True]),)
    with pytest.raises(ValueError, match=f"{size} came|reshape"):
        receive(lora_layout([(3, 2)], 1), np.zeros(size, np.float32), masks)
