"""FedYogi (Reddi et al., arXiv 2003.00295): v ← v − (1 − β2) Δ² sign(v − Δ²)."""

from typing import Annotated

import numpy as np
from pydantic import Field

from fedray.aggregation.adaptive import Adaptive, Numbers


class Yogi(Adaptive):
    """FedYogi: v ← v − (1 − β2) Δ² sign(v − Δ²), which moves v less than FedAdam where Δ² is small."""

    name = "yogi"

    beta2: Annotated[float, Field(ge=0, le=1)] = 0.99
    """β2: 1 − β2 is the rate at which v changes; with 1, β1 = 0 and η = 2τ, FedYogi is FedAvg."""

    def second(self, v: Numbers, squares: Numbers) -> Numbers:
        moved: Numbers = v - (1 - self.beta2) * squares * np.sign(v - squares)
        return moved


ENTRY = Yogi
