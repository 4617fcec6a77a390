"""A plain step: θ ← θ + η Δ. With η = 1 the server takes the mean, which is FedAvg (McMahan et al., 2017)."""

from typing import Annotated

import numpy as np
from pydantic import Field

from fedray.aggregation.server_optimizer import ServerOptimizer, State
from fedray.types import Vector


class Sgd(ServerOptimizer):
    """θ ← θ + η Δ."""

    name = "sgd"

    lr: Annotated[float, Field(gt=0)] = 1.0
    """η; 1 takes the mean."""

    def step(self, state: State, values: Vector, mean: Vector) -> tuple[Vector, State]:
        if self.lr == 1:  # θ + (mean − θ) would round
            return mean, state
        return (values + self.lr * (mean.astype(np.float64) - values)).astype(np.float32), state


ENTRY = Sgd
TAKE_THE_MEAN = Sgd()
"""The server optimizer of methods that leave it out."""
