"""Carried sums against dense ones, and their way into a model's second branch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertForSequenceClassification

from fedray.adapters.layout import Layout, Slot
from fedray.aggregation.low_rank import LowRank
from fedray.config import LoraSection
from fedray.methods.parts.carried import attach, carry, load
from fedray.methods.parts.factors import split, zero

SHAPES = ((9, 7), (4, 8))
LAYOUT = Layout(
    tuple(
        slot
        for index, (d_out, d_in) in enumerate(SHAPES)
        for slot in (Slot(f"layer.{index}", "A", (2, d_in)), Slot(f"layer.{index}", "B", (d_out, 2)))
    )
)


def round_of(rng, columns):
    """One update per target."""
    return [
        LowRank(
            rng.normal(size=(d_out, columns)).astype(np.float32), rng.normal(size=(columns, d_in)).astype(np.float32)
        )
        for d_out, d_in in SHAPES
    ]


def dense(x):
    return x.B.astype(np.float64) @ x.A.astype(np.float64)


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 3), min_size=1, max_size=8), st.integers(1, 10))
def test_a_sum_is_exact_until_it_has_too_many_columns(seed, columns, carried_rank):
    """Columns are counted: min(their number, carried_rank, d_out, d_in) for each target. While none are lost, or where
    carried_rank holds every matrix, the sum is the dense one and the error zero (or rounding)."""
    rng, sums = np.random.default_rng(seed), zero(LAYOUT)
    exact = [np.zeros(shape) for shape in SHAPES]
    lost = [False, False]
    for number in columns:
        before, updates = sums, round_of(rng, number)
        sums, error = carry(sums, updates, carried_rank)
        errors = []
        for target, (old, update) in enumerate(zip(before, updates, strict=True)):
            exact[target] += dense(update)
            most = min(carried_rank, *SHAPES[target])
            total = dense(old) + dense(update)
            kept = np.linalg.svd(total, compute_uv=False)[most:] if old.rank + number > most else np.zeros(1)
            errors.append(np.linalg.norm(kept) / max(np.linalg.norm(total), 1e-9))
            lost[target] |= errors[-1] > 1e-9
            assert sums[target].rank == min(old.rank + number, most)
            if not lost[target]:
                np.testing.assert_allclose(dense(sums[target]), exact[target], atol=1e-4)
        assert error == pytest.approx(max(errors), rel=1e-3, abs=2e-6)


def test_columns_that_are_zero_count():
    """A plan walks on zeros: it must find as many columns as a run will have."""
    sums = zero(LAYOUT)
    for found in ([3, 3], [6, 4], [6, 4]):
        sums, error = carry(sums, [LowRank.zeros(*shape, 3) for shape in SHAPES], 6)
        assert ([x.rank for x in sums], error) == (found, 0)


def test_an_update_without_columns_changes_no_bit():
    sums, _ = carry(zero(LAYOUT), round_of(np.random.default_rng(0), 3), 5)
    again, error = carry(sums, [LowRank.zeros(*shape) for shape in SHAPES], 2)
    assert again == sums
    assert error == 0


def test_a_model_adds_what_is_carried():
    """y = W0 x + s C x with the branch's own B = 0, for a sum of two columns in branches of rank 5; loading another
    sum leaves nothing of the first. No branch is wider than its layer: 16 for carried_rank 40."""
    model = tiny_model()
    adapter = attach(model, LoraSection(rank=2, alpha=6.0, dropout=0.5), 5)
    layout, rng = adapter.layout("rest"), np.random.default_rng(0)
    sums = [
        tuple(
            LowRank(rng.normal(size=(16, columns)).astype(np.float32), rng.normal(size=(columns, 16)).astype("f4"))
            for _ in adapter.targets
        )
        for columns in (4, 2)
    ]
    x = torch.from_numpy(rng.normal(size=(1, 3, 16)).astype(np.float32))
    for carried in sums:
        load(adapter, carried)
        assert [branch.rank for branch in split(layout, adapter.read("rest"))] == [5] * 4
        for layer, c in zip(adapter.targets.values(), carried, strict=True):
            base = layer.get_base_layer()(x).detach().numpy()
            np.testing.assert_allclose(
                layer(x).detach().numpy() - base, 3 * x.numpy() @ dense(c).T, rtol=1e-4, atol=1e-4
            )
    wide = attach(tiny_model(), LoraSection(rank=2), 40).layout("rest")
    assert {slot.shape for slot in wide.slots} == {(16, 16)}


def tiny_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return BertForSequenceClassification(BertConfig(**sizes, vocab_size=30, num_labels=3)).eval()
