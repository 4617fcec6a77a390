"""FedAdam (Reddi et al., arXiv 2003.00295): v ← β2 v + (1 − β2) Δ²."""

from typing import Annotated

from pydantic import Field

from fedray.aggregation.adaptive import Adaptive, Numbers


class Adam(Adaptive):
    """FedAdam: v ← β2 v + (1 − β2) Δ²."""

    name = "adam"

    beta2: Annotated[float, Field(ge=0, le=1)] = 0.99
    """β2, share of v that stays; with 1, β1 = 0 and η = 2τ, FedAdam is FedAvg."""

    def second(self, v: Numbers, squares: Numbers) -> Numbers:
        return self.beta2 * v + (1 - self.beta2) * squares


ENTRY = Adam
