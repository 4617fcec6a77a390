"""Plain torch as an engine."""

import math

import torch
from torch import nn

from fedray.adapters.adapter import Adapter
from fedray.training.engine import Steer
from fedray.training.optimizer import RoundOptimizer
from fedray.training.process_group import SINGLE_PROCESS, ProcessGroup
from fedray.training.schedule import Schedule

FLOAT16_LOSS_SCALE = 1024.0
"""Constant, so that no step is skipped and a client's result depends on nobody before it."""


def loss_scale(model: nn.Module) -> float:
    """Return by what a loss is multiplied before its gradient is taken: those that pass through a float16 model would
    vanish otherwise."""
    half = any(parameter.dtype == torch.float16 for parameter in model.parameters())
    return FLOAT16_LOSS_SCALE if half else 1.0


class TorchEngine:
    """Trains with torch's AdamW or SGD.

    Args:
        adapter: with what is to train already chosen.
        loss_scale: gradients are computed of the loss times this, and divided by it before they are clipped.
        process_group: whose gradients are added up before each step.
    """

    def __init__(self, adapter: Adapter, loss_scale: float = 1.0, process_group: ProcessGroup = SINGLE_PROCESS) -> None:
        self.adapter = adapter
        self.process_group = process_group
        self.loss_scale = loss_scale
        self._optimizer: RoundOptimizer | None = None
        self._steer: Steer | None = None

    def begin(self, schedule: Schedule, steer: Steer | None = None) -> None:
        self._steer = steer
        self._optimizer = RoundOptimizer(self.adapter.trainable_groups(), schedule)
        for parameter in self._optimizer.parameters:
            parameter.grad = None  # a training that failed may have left one

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        if not loss.requires_grad:  # interventions that edit no token of these prompts
            return
        (loss if self.loss_scale == 1 else loss * self.loss_scale).backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        optimizer = self._begun()
        self.process_group.sum_gradients(optimizer.parameters)
        if self.loss_scale != 1:
            torch._foreach_div_([p.grad for p in optimizer.parameters if p.grad is not None], self.loss_scale)
        if self._steer is not None:
            self._steer()
        optimizer.step()

    def finite(self) -> bool:
        largest = torch._foreach_norm(self._begun().parameters, math.inf)
        return bool(torch.stack(largest).isfinite().all())

    def close(self) -> None:
        self._optimizer = self._steer = None

    def _begun(self) -> RoundOptimizer:
        if self._optimizer is None:
            raise RuntimeError("begin() comes first")
        return self._optimizer
