"""FedAvgM: a step with momentum (Hsu et al., arXiv 1909.06335)."""

from typing import Annotated

import numpy as np
from pydantic import Field

from fedray.aggregation.server_optimizer import ServerOptimizer, State
from fedray.types import Vector


class Momentum(ServerOptimizer):
    """FedAvgM: m ← β m + Δ, θ ← θ + η m; with Nesterov's momentum θ ← θ + η (Δ + β m) (DiLoCo, arXiv 2311.08105)."""

    name = "momentum"

    lr: Annotated[float, Field(gt=0)] = 1.0
    """η."""
    beta: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """β; 0 is `sgd`."""
    nesterov: bool = False
    """Whether the step looks ahead by one momentum."""

    def init(self, size: int) -> State:
        return {"m": np.zeros(size, np.float32)}

    def step(self, state: State, values: Vector, mean: Vector) -> tuple[Vector, State]:
        delta = mean.astype(np.float64) - values
        m = self.beta * state["m"].astype(np.float64) + delta
        step = delta + self.beta * m if self.nesterov else m
        return (values + self.lr * step).astype(np.float32), {"m": m.astype(np.float32)}


ENTRY = Momentum
