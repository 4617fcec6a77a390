"""Only some rows of a LoRA's B exist (FedHFT's masks)."""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedray.aggregation.masks import row_count
from fedray.types import Capacity

if TYPE_CHECKING:
    from fedray.adapters.adapter import Adapter


def keep_rows(
    b: Tensor, existing: Tensor | None, rows: npt.NDArray[np.int64] | None, d_out: int
) -> tuple[Tensor, Tensor | None]:
    """Return some rows of a B, and their indices as a tensor.

    Args:
        b: [m, r].
        existing: indices of the m rows that exist, [m]; the others are zero. None: all.
        rows: indices of the rows wanted; None: all.
        d_out: rows of the whole B.

    Raises:
        ValueError: not sorted distinct indices below d_out.
    """
    whole = b if existing is None else b.new_zeros(d_out, b.shape[1]).index_copy(0, existing, b)
    if rows is None:
        return whole, None
    array = np.asarray(rows)
    if array.ndim != 1 or len(array) == 0 or (np.diff(array) <= 0).any() or array[0] < 0:
        raise ValueError(f"rows: expected sorted distinct indices, got {rows}")
    if array[-1] >= d_out:
        raise ValueError(f"rows: index {array[-1]}, but the layer has {d_out} rows")
    index = torch.as_tensor(array, dtype=torch.long, device=b.device)
    return whole.index_select(0, index), index


def hold_rows(adapter: "Adapter", capacity: Capacity) -> None:
    """Keep only the first ⌈ρ · d_out⌉ rows of each B, with the values that they have; layout("lora") is new.

    The `fit_capacity` of an adapter whose method sets as many rows for every client later (`Adapter.set_rows`).

    Args:
        capacity: ρ is its mask_ratio.
    """
    ratio = capacity.get("mask_ratio", 1.0)
    adapter.set_rows({path: np.arange(row_count(layer.d_out, ratio)) for path, layer in adapter.targets.items()})
