"""Padding and order of batches, against values written out by hand."""

import numpy as np
import pyarrow as pa
import torch

from fedray.data.batches import batches

ROWS = [[1, 2, 3], [4], [5, 6]]


def table(**columns: pa.Array) -> pa.Table:
    return pa.table({"input_ids": pa.array(ROWS, pa.list_(pa.int32())), **columns})


def test_each_batch_is_padded_on_the_right_to_its_own_longest_row() -> None:
    data = table(labels=pa.array([2, 0, 1], pa.int32()))
    first, second = batches(data, 2, pad_token_id=9)
    assert first["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert first["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert first["labels"].tolist() == [2, 0]
    assert second["input_ids"].tolist() == [[5, 6]]
    assert all(tensor.dtype == torch.int64 for tensor in first.values())


def test_left_padding_keeps_rows_and_labels_at_the_right_edge() -> None:
    labels = pa.array([[-100, 2, 3], [4], [-100, 6]], pa.list_(pa.int32()))
    (batch,) = batches(table(labels=labels, answer=pa.array(["a", "b", "c"])), 3, 9, left_pad=True)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [9, 9, 4], [9, 5, 6]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [-100, -100, 4], [-100, -100, 6]]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_order_chooses_repeats_and_leaves_out_rows() -> None:
    (batch,) = batches(table(labels=pa.array([0.5, 1.5, 2.5], pa.float32())), 4, 0, order=np.array([2, 0, 2]))
    assert batch["input_ids"].tolist() == [[5, 6, 0], [1, 2, 3], [5, 6, 0]]
    assert batch["labels"].tolist() == [2.5, 0.5, 2.5]
    assert batch["labels"].dtype == torch.float32


def test_token_types_are_padded_with_zero() -> None:
    types = pa.array([[0, 0, 1], [0], [0, 1]], pa.list_(pa.int32()))
    (batch,) = batches(table(token_type_ids=types, labels=pa.array([0, 0, 0], pa.int32())), 3, 9)
    assert batch["token_type_ids"].tolist() == [[0, 0, 1], [0, 0, 0], [0, 1, 0]]


def test_slices_and_chunked_tables_give_their_own_rows() -> None:
    data = table(labels=pa.array([2, 0, 1], pa.int32()))
    (sliced,) = batches(data.slice(1), 2, 9)
    assert sliced["input_ids"].tolist() == [[4, 9], [5, 6]]
    (chunked,) = batches(pa.concat_tables([data, data.slice(2)]), 9, 9)
    assert chunked["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9], [5, 6, 9], [5, 6, 9]]
    assert chunked["labels"].tolist() == [2, 0, 1, 1]


def test_an_empty_table_has_no_batches() -> None:
    assert list(batches(table(labels=pa.array([0, 0, 0], pa.int32())).slice(3), 2, 9)) == []
