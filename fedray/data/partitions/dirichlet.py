"""`dirichlet`: label skew; each class is divided among the clients by a draw from a Dirichlet distribution."""

from typing import Annotated

import numpy as np
from pydantic import Field

from fedray.config.partition import ExampleColumns, IntArray, PartitionConfig, Shares
from fedray.data.strata import skewed_values, strata_of


class Dirichlet(PartitionConfig):
    """Shares of every class, drawn class by class."""

    alpha: Annotated[float, Field(gt=0)] = 0.3
    """Concentration; smaller is more skewed."""
    column: str | None = None
    """The column to skew on, default the label."""

    def assign(
        self, examples: ExampleColumns, train: IntArray, num_clients: int | None, rng: np.random.Generator
    ) -> Shares:
        count = self.required_count(num_clients)
        strata, classes = strata_of(skewed_values(examples, self.column, self.name), train)
        return Shares(strata, rng.dirichlet([self.alpha] * count, size=len(classes)).T)


ENTRY = Dirichlet
