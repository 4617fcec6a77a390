"""Bytes of an adapter's and its training's tensors, counted from shapes: the parts of `EngineConfig.memory`."""

from collections.abc import Iterable, Sequence

import torch

from fedray.adapters.adapter import Adapter, TrainableGroup
from fedray.config import EngineMemory, Memory, TrainConfig

FLOAT32 = 4
"""Bytes of one number."""


def plain_memory(adapter: Adapter, weights: int, optimizer: int) -> EngineMemory:
    """Return what an engine holds that keeps everything on the device, with one gradient per trained number.

    Args:
        weights: bytes of the model before the adapter was attached.
        optimizer: bytes of the optimizer's state.
    """
    return EngineMemory(
        Memory(weights, inserted_bytes(adapter, weights), trained_bytes(adapter.trainable_groups()), optimizer)
    )


def inserted_bytes(adapter: Adapter, weights: int) -> int:
    """Return the bytes that attaching the adapter added to a model of `weights` bytes."""
    return tensor_bytes([*adapter.model.parameters(), *adapter.model.buffers()]) - weights


def trained_bytes(groups: Sequence[TrainableGroup]) -> int:
    """Return the bytes of the parameters that train."""
    return tensor_bytes([parameter for group in groups for parameter in group.parameters])


def optimizer_bytes(groups: Sequence[TrainableGroup], train: TrainConfig) -> int:
    """Return the bytes of the state of torch's AdamW (two moments per number, a step per tensor) or SGD."""
    trained = trained_bytes(groups)
    if train.optimizer == "sgd":
        return trained if train.momentum else 0
    return 2 * trained + FLOAT32 * sum(len(group.parameters) for group in groups)


def frozen_bytes(base: Iterable[torch.Tensor]) -> int:
    """Return the bytes of a base model that do not train.

    Args:
        base: its parameters and buffers, once an adapter is attached.
    """
    return tensor_bytes([tensor for tensor in base if not tensor.requires_grad])


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of tensors; tied ones count once."""
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())
