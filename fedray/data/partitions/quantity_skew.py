"""`quantity_skew`: clients differ in how many examples they have, not in their distribution."""

from typing import Annotated

import numpy as np
from pydantic import Field

from fedray.config.partition import ExampleColumns, IntArray, PartitionConfig, Shares


class QuantitySkew(PartitionConfig):
    """Shares of all examples, drawn from a Dirichlet distribution."""

    alpha: Annotated[float, Field(gt=0)] = 0.3
    """Concentration; smaller is more skewed."""

    def assign(
        self, examples: ExampleColumns, train: IntArray, num_clients: int | None, rng: np.random.Generator
    ) -> Shares:
        count = self.required_count(num_clients)
        return Shares(np.zeros(len(examples), dtype=np.int64), rng.dirichlet([self.alpha] * count)[:, None])


ENTRY = QuantitySkew
