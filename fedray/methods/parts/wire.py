"""The type in which numbers travel: float32 unchanged, or bfloat16 rounded to nearest (half the bytes)."""

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from fedray.types import Vector

WireType = Literal["float32", "bfloat16"]
Wire = npt.NDArray[np.float32] | npt.NDArray[np.int16]
"""What travels; bfloat16 has no numpy type of its own and travels as its bits in int16."""


def encode(vector: Vector, dtype: WireType) -> Wire:
    """Return the vector as it travels. [d] -> [d]"""
    if dtype == "float32":
        return vector
    bits: npt.NDArray[np.int16] = torch.tensor(vector, dtype=torch.bfloat16).view(torch.int16).numpy()
    return bits


def decode(wire: Wire) -> Vector:
    """Return what arrives, as float32. [d] -> [d]"""
    if wire.dtype == np.float32:
        return wire.astype(np.float32, copy=False)
    return (wire.astype(np.int32) << 16).view(np.float32)  # bfloat16 is the upper half of float32
