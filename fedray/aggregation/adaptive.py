"""What FedAdagrad, FedAdam and FedYogi have in common (Reddi et al., ICLR 2021, arXiv 2003.00295, algorithm 2).

m ← β1 m + (1 − β1) Δ,  v ← (each its own rule),  θ ← θ + η m / (√v + τ)

As in the paper, no bias is corrected, m starts at 0, and v at τ².
"""

from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field

from fedray.aggregation.server_optimizer import ServerOptimizer, State
from fedray.types import Vector

Numbers = npt.NDArray[np.float64]


class Adaptive(ServerOptimizer):
    """A step whose size adapts to each value. Subclasses say how v changes."""

    lr: Annotated[float, Field(gt=0)]
    """η, which has to be tuned: the paper's best values lie between 0.001 and 10."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """β1, share of m that stays."""
    tau: Annotated[float, Field(gt=0)] = 1e-3
    """τ: the larger, the less adaptive."""

    def second(self, v: Numbers, squares: Numbers) -> Numbers:
        """Return the next v [d].

        Args:
            v: of the round before [d].
            squares: Δ² [d].
        """
        raise NotImplementedError

    def init(self, size: int) -> State:
        return {"m": np.zeros(size, np.float32), "v": np.full(size, self.tau**2, np.float32)}

    def step(self, state: State, values: Vector, mean: Vector) -> tuple[Vector, State]:
        change = mean.astype(np.float64) - values
        m = self.beta1 * state["m"].astype(np.float64) + (1 - self.beta1) * change
        v = self.second(state["v"].astype(np.float64), change**2)
        moved = values + self.lr * m / (np.sqrt(v) + self.tau)
        return moved.astype(np.float32), {"m": m.astype(np.float32), "v": v.astype(np.float32)}
