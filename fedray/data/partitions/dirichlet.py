"""`dirichlet`: label skew; each class is divided among the clients by a draw from a Dirichlet distribution.

The draws of published code are options. Theirs, too, are class by class, and they divide a class of n examples at the
whole numbers below n times the cumulative shares.

- FedHFT, and FedML and NIID-Bench before it: `cap: true`, `fewest: classes`, and alpha = 10 / classes in FedHFT.
- FederatedScope as FedSA-LoRA uses it: `fewest: 1`, alpha 0.5.
"""

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from fedray.config.partition import ExampleColumns, FloatArray, IntArray, PartitionConfig, Shares
from fedray.config.section import PositiveInt
from fedray.data.strata import columns_of, skewed_values, strata_of
from fedray.errors import DataError

DRAWS = 1000
"""Draws after which no client's minimum is expected to be reached any more."""


class Dirichlet(PartitionConfig):
    """Shares of every class, drawn class by class."""

    alpha: Annotated[float, Field(gt=0)] = 0.3
    """Concentration; smaller is more skewed."""
    column: str | None = None
    """The column to skew on, default the label."""
    cap: bool = False
    """Whether a client that has its even share of all examples gets none of the classes that follow (FedHFT)."""
    fewest: PositiveInt | Literal["classes"] | None = None
    """Fewest examples per client; all classes are drawn again until every client has them. `classes`: the number of
    classes. Default: a few draws, after which clients with fewer than min_examples get examples of the largest
    clients."""

    def assign(
        self, examples: ExampleColumns, train: IntArray, num_clients: int | None, rng: np.random.Generator
    ) -> Shares:
        count = self.required_count(num_clients)
        strata, classes = strata_of(skewed_values(examples, self.column, self.name), train)
        if not self.cap and self.fewest is None:
            return Shares(strata, rng.dirichlet([self.alpha] * count, size=len(classes)).T)
        sizes = np.bincount(strata[train], minlength=len(classes))
        fewest = len(classes) if self.fewest == "classes" else self.fewest or 0
        for _ in range(DRAWS):
            counts = counts_by_class(sizes, rng.dirichlet([self.alpha] * count, size=len(classes)).T, self.cap)
            if counts.sum(axis=1).min() >= fewest:
                return Shares(strata, columns_of(counts.astype(np.float64)))
        raise DataError(
            f"partition.fewest: none of {DRAWS} draws gives each of {count} clients {fewest} of {len(train)} examples; "
            "lower it or clients.count, or raise partition.alpha"
        )


def counts_by_class(sizes: IntArray, shares: FloatArray, cap: bool) -> IntArray:
    """Return how many examples of each class each client gets: int [clients, classes].

    Args:
        sizes: int [classes], examples of every class.
        shares: [clients, classes], the draw of every class.
        cap: whether a client with at least its even share of the examples gets none of later classes. If the drawn
            shares of all others are zero, which a tiny alpha makes likely, they share the class evenly.
    """
    counts = np.zeros(shares.shape, dtype=np.int64)
    for stratum, size in enumerate(sizes):
        share = shares[:, stratum : stratum + 1]
        if cap:
            below = counts.sum(axis=1, keepdims=True) * len(shares) < sizes.sum()
            share = share * below if (share * below).any() else below.astype(np.float64)
        edges = np.floor(np.cumsum(columns_of(share)) * size).astype(np.int64)
        edges[-1] = size  # what rounding errors of the cumulative sum would miss
        counts[:, stratum] = np.diff(edges, prepend=0)
    return counts


ENTRY = Dirichlet
