"""`by_column`: every value of a column is a client."""

from typing import Self

import numpy as np
from pydantic import model_validator

from fedray.config.partition import ExampleColumns, IntArray, NaturalClients, PartitionConfig


class ByColumn(PartitionConfig):
    """The values of a column are the clients."""

    column: str | None = None
    """The column whose values are the clients; every training example must have one."""

    @model_validator(mode="after")
    def _has_column(self) -> Self:
        if not self.column:
            raise ValueError("column: the partition `by_column` needs the column whose values are the clients")
        return self

    def assign(
        self, examples: ExampleColumns, train: IntArray, num_clients: int | None, rng: np.random.Generator
    ) -> NaturalClients:
        column = self.column or ""
        return NaturalClients(examples.values(column), f"column {column!r}")


ENTRY = ByColumn
