"""`mixed_task`: every client has its own mixture of tasks."""

from typing import Annotated

import numpy as np
from pydantic import Field

from fedray.config.partition import ExampleColumns, IntArray, PartitionConfig, Shares
from fedray.data.strata import columns_of, strata_of


class MixedTask(PartitionConfig):
    """Mixtures of tasks, drawn client by client from a Dirichlet distribution."""

    alpha: Annotated[float, Field(gt=0)] = 0.3
    """Concentration; smaller is more skewed."""

    def assign(
        self, examples: ExampleColumns, train: IntArray, num_clients: int | None, rng: np.random.Generator
    ) -> Shares:
        count = self.required_count(num_clients)
        strata, tasks = strata_of(examples.values("task"), train)
        return Shares(strata, columns_of(rng.dirichlet([self.alpha] * len(tasks), size=count)))


ENTRY = MixedTask
