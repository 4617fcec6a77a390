"""What moves the parameters: `loop` decides on batches, losses and draws, an engine on gradients and the optimizer.

An engine serves one adapter for as long as that lives; `begin` makes it as good as new for the next client's round.
"""

import math
from typing import Protocol

import torch

from fedray.adapters.adapter import Adapter
from fedray.training.optimizer import RoundOptimizer, Schedule


class Engine(Protocol):
    """Trains the adapter that it was made for. Values are loaded into the adapter before `begin`, and read from it
    after the last `step`."""

    @property
    def adapter(self) -> Adapter: ...

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


class TorchEngine:
    """Plain torch."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self._optimizer: RoundOptimizer | None = None

    def begin(self, schedule: Schedule) -> None:
        self._optimizer = RoundOptimizer(self.adapter.trainable_groups(), schedule)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        self._begun().step()

    def finite(self) -> bool:
        largest = torch._foreach_norm(self._begun().parameters, math.inf)
        return bool(torch.stack(largest).isfinite().all())

    def _begun(self) -> RoundOptimizer:
        if self._optimizer is None:
            raise RuntimeError("begin() comes first")
        return self._optimizer
