"""What moves the parameters: `loop` decides on batches, losses and draws, an engine on gradients and the optimizer.

An engine serves one adapter for as long as that lives; `begin` makes it as good as new for the next client's round.
"""

import math
from typing import Protocol

import torch

from fedray.adapters.adapter import Adapter
from fedray.config import TierConfig, TrainConfig
from fedray.training.deepspeed import DeepSpeedEngine
from fedray.training.optimizer import RoundOptimizer, Schedule
from fedray.training.process_group import SINGLE_PROCESS, ProcessGroup

FLOAT16_LOSS_SCALE = 1024.0
"""Constant, so that no step is skipped and a client's result depends on nobody before it."""


class Engine(Protocol):
    """Trains the adapter that it was made for. Values are loaded into the adapter before `begin`, and read from it
    after the last `step`."""

    @property
    def adapter(self) -> Adapter: ...

    @property
    def process_group(self) -> ProcessGroup:
        """The processes that train together; this one may be alone."""
        ...

    def begin(self, schedule: Schedule) -> None:
        """Start a round from the adapter's current values, with a fresh optimizer."""
        ...

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the loss's gradient. last: whether `step` follows, or another micro-batch of the same step."""
        ...

    def step(self) -> None:
        """Clip the gradients, move the parameters, drop the gradients."""
        ...

    def finite(self) -> bool:
        """Return whether every trained value is finite."""
        ...

    def close(self) -> None:
        """Let go of the adapter, which is not used any more."""
        ...


class TorchEngine:
    """Plain torch.

    loss_scale: gradients are computed of the loss times this, and divided by it before they are clipped: those that
    pass through a float16 model would vanish otherwise.
    process_group: whose gradients are added up before each step.
    """

    def __init__(self, adapter: Adapter, loss_scale: float = 1.0, process_group: ProcessGroup = SINGLE_PROCESS) -> None:
        self.adapter = adapter
        self.process_group = process_group
        self.loss_scale = loss_scale
        self._optimizer: RoundOptimizer | None = None

    def begin(self, schedule: Schedule) -> None:
        self._optimizer = RoundOptimizer(self.adapter.trainable_groups(), schedule)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        (loss if self.loss_scale == 1 else loss * self.loss_scale).backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        optimizer = self._begun()
        self.process_group.sum_gradients(optimizer.parameters)
        if self.loss_scale != 1:
            torch._foreach_div_([p.grad for p in optimizer.parameters if p.grad is not None], self.loss_scale)
        optimizer.step()

    def finite(self) -> bool:
        largest = torch._foreach_norm(self._begun().parameters, math.inf)
        return bool(torch.stack(largest).isfinite().all())

    def close(self) -> None:
        self._optimizer = None

    def _begun(self) -> RoundOptimizer:
        if self._optimizer is None:
            raise RuntimeError("begin() comes first")
        return self._optimizer


def make_engine(
    adapter: Adapter,
    train: TrainConfig,
    tier: TierConfig,
    device: str | torch.device,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> Engine:
    """Return the tier's engine for the adapter, which has its method's first values and trainable groups by now.

    Where the method's adapter depends on the tier's capacity, its layouts are new (`Adapter.fit`).

    Args:
        train: with the tier's batch_size and accumulation.

    Raises:
        ConfigError: the tier's `deepspeed` contradicts other settings, or the machine lacks what its `offload` needs.
    """
    adapter.fit(tier.capacity)
    if tier.engine == "torch":
        half = any(parameter.dtype == torch.float16 for parameter in adapter.model.parameters())
        return TorchEngine(adapter, FLOAT16_LOSS_SCALE if half else 1.0, process_group)
    return DeepSpeedEngine(adapter, train, tier.offload, tier.deepspeed, device)
