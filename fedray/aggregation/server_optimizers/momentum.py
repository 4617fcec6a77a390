"""FedAvgM: a step with momentum (Hsu et al., arXiv 1909.06335)."""

from typing import Annotated

import numpy as np
from pydantic import Field

from fedray.aggregation.server_optimizer import ServerOptimizer, State
from fedray.types import Vector


class Momentum(ServerOptimizer):
    """FedAvgM: m ← β m + Δ, θ ← θ + η m."""

    name = "momentum"

    lr: Annotated[float, Field(gt=0)] = 1.0
    """η."""
    beta: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """β; 0 is `sgd`."""

    def init(self, size: int) -> State:
        return {"m": np.zeros(size, np.float32)}

    def step(self, state: State, values: Vector, mean: Vector) -> tuple[Vector, State]:
        m = self.beta * state["m"].astype(np.float64) + (mean.astype(np.float64) - values)
        return (values + self.lr * m).astype(np.float32), {"m": m.astype(np.float32)}


ENTRY = Momentum
