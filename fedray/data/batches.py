"""Converts tables of tokens to batches of tensors, padded to the longest example of each batch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from fedray.data.shards import NOT_READ
from fedray.types import IGNORED

Indices = npt.NDArray[np.integer]


@dataclass(frozen=True)
class _Ragged:
    """A list column as flat values and where each row starts; nothing is copied."""

    values: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int32]

    def padded(self, rows: Indices, fill: int, left: bool) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Return (values, filled) of these rows, both [rows, longest]."""
        starts, lengths = self.offsets[rows], np.diff(self.offsets)[rows]
        width = int(lengths.max(initial=0))
        place = np.arange(width)
        filled = place >= width - lengths[:, None] if left else place < lengths[:, None]
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        padded = np.full(filled.shape, fill, dtype=np.int64)
        padded[filled] = self.values[np.repeat(starts, lengths) + within]
        return padded, filled


_Column = _Ragged | npt.NDArray[np.int64] | npt.NDArray[np.float32]


def batches(
    table: pa.Table,
    batch_size: int,
    pad_token_id: int,
    order: Indices | None = None,
    device: torch.device | str = "cpu",
    left_pad: bool = False,
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches of rows as tensors.

    Args:
        table: a client's tokens, as `Shard` documents them.
        batch_size: most rows of a batch.
        pad_token_id: token that fills shorter rows.
        order: rows in the order of the batches; default that of the table.
        device: of the tensors.
        left_pad: pad before the tokens instead of after them, for generation.

    Returns:
        `input_ids`, `attention_mask` and, where the table has them, `token_type_ids`: int64 [batch, longest].
        `labels`: int64 [batch] (classes), float32 [batch] (regression), or int64 [batch, longest] with -100 on padding
        and prompt (causal_lm).
    """
    columns = {name: _column(table[name]) for name in table.column_names if name not in NOT_READ}
    rows = np.arange(table.num_rows) if order is None else order
    fills = {"input_ids": pad_token_id, "labels": IGNORED, "token_type_ids": 0}
    for start in range(0, len(rows), batch_size):
        batch = _batch(columns, rows[start : start + batch_size], fills, left_pad)
        yield {name: torch.from_numpy(array).to(device) for name, array in batch.items()}


def batches_by_length(
    table: pa.Table,
    batch_size: int,
    pad_token_id: int,
    device: torch.device | str = "cpu",
    left_pad: bool = False,
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Yield batches in the order of `by_length`, each with the indices of its rows; arguments as of `batches`."""
    order = by_length(table)
    rows = (order[start : start + batch_size].tolist() for start in range(0, len(order), batch_size))
    yield from zip(rows, batches(table, batch_size, pad_token_id, order, device, left_pad), strict=True)


def by_length(table: pa.Table) -> npt.NDArray[np.int64]:
    """Return the order with the longest example first: a batch that does not fit into memory fails at once."""
    return np.argsort(-lengths(table), kind="stable")


def lengths(table: pa.Table) -> npt.NDArray[np.int64]:
    """Return each example's number of tokens."""
    found: npt.NDArray[np.int64] = pc.list_value_length(table["input_ids"]).to_numpy().astype(np.int64)
    return found


def _batch(
    columns: Mapping[str, _Column], rows: Indices, fills: Mapping[str, int], left: bool
) -> dict[str, np.ndarray]:
    batch: dict[str, np.ndarray] = {}
    for name, column in columns.items():
        if isinstance(column, _Ragged):
            batch[name], filled = column.padded(rows, fills[name], left)
            if name == "input_ids":
                batch["attention_mask"] = filled.astype(np.int64)
        else:
            batch[name] = column[rows]
    return batch


def _column(column: pa.ChunkedArray) -> _Column:
    """Return a list column as ragged values, class indices as int64 and numbers as float32."""
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if pa.types.is_list(array.type):
        return _Ragged(array.values.to_numpy(), array.offsets.to_numpy())
    values: npt.NDArray[np.float32] = array.to_numpy()
    return values if pa.types.is_floating(array.type) else values.astype(np.int64)
