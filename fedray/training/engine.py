"""Engines update the parameters: `loop` decides on batches, losses and draws, an engine on gradients and the optimizer.

An engine's `fedray.config.EngineConfig` is its configuration and says what is known of it before it is built. An engine
serves one adapter, and `begin` resets it for the next client's round.
"""

from collections.abc import Callable
from typing import Protocol

import torch

from fedray.adapters.adapter import Adapter
from fedray.config import TierConfig, TrainConfig
from fedray.training.process_group import SINGLE_PROCESS, ProcessGroup
from fedray.training.schedule import Schedule

Steer = Callable[[], None]
"""Changes the gradients that the adapter's parameters hold (`fedray.training.steering`)."""


class Engine(Protocol):
    """Trains the adapter that it was made for. Values are loaded into the adapter before `begin`, and read from it
    after the last `step`."""

    @property
    def adapter(self) -> Adapter:
        """What is trained."""
        ...

    @property
    def process_group(self) -> ProcessGroup:
        """The processes that train one client together; often a single one."""
        ...

    def begin(self, schedule: Schedule, steer: Steer | None) -> None:
        """Start a training from the adapter's current values, with a fresh optimizer. It moves the parameters of
        `adapter.trainable_groups()`, which may be fewer now than when the engine was made.

        Args:
            schedule: `rates(groups, step)` gives the learning rates of every step.
            steer: called in every step once the parameters hold the whole gradient, before it is clipped; None: nothing
                is to be called.

        Raises:
            ConfigError: the engine cannot do that (`EngineConfig.steers`).
        """
        ...

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the loss's gradient.

        Args:
            loss: scalar; the sum over a step's micro-batches is the step's mean loss. It requires no gradient where
                interventions edit no token of the prompts.
            last: whether `step` follows, or another micro-batch of the same step.
        """
        ...

    def step(self) -> None:
        """Clip the gradients, move the parameters, drop the gradients."""
        ...

    def finite(self) -> bool:
        """Return whether every trained value is finite."""
        ...

    def close(self) -> None:
        """Release the adapter, which is not used any more."""
        ...


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
        adapter: on the worker's base model.
        train: with the tier's batch_size and accumulation.
        tier: whose engine it is, and whose capacity the adapter must fit.
        device: where steps are computed.
        process_group: the processes that train one client together.

    Raises:
        ConfigError: the engine's settings contradict others, or the machine lacks what it needs.
    """
    adapter.fit(tier.capacity)
    adapter.settle()
    engine: Engine = tier.engine.build(adapter, train, str(device), process_group)
    return engine
