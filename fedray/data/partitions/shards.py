"""`shards`: every client holds a fixed number of classes."""

import numpy as np

from fedray.config.partition import ExampleColumns, FloatArray, IntArray, PartitionConfig, Shares
from fedray.config.section import PositiveInt
from fedray.data.strata import columns_of, skewed_values, strata_of
from fedray.errors import DataError


class Shards(PartitionConfig):
    """Even shares of a class for the clients that hold it."""

    classes_per_client: PositiveInt = 2
    """Classes that each client holds (at least one of each class's shards)."""
    column: str | None = None
    """The column to skew on, default the label."""

    def assign(
        self, examples: ExampleColumns, train: IntArray, num_clients: int | None, rng: np.random.Generator
    ) -> Shares:
        count, each = self.required_count(num_clients), self.classes_per_client
        strata, classes = strata_of(skewed_values(examples, self.column, self.name), train)
        if each > len(classes):
            raise DataError(f"partition.classes_per_client: {each}, but there are only {len(classes)} classes")
        if count * each < len(classes):
            raise DataError(
                f"partition.classes_per_client: {count} clients with {each} classes each cannot hold all "
                f"{len(classes)} classes; set it to at least {-(-len(classes) // count)}, or raise clients.count"
            )
        sizes = np.bincount(strata[train], minlength=len(classes))
        return Shares(strata, holders(sizes, count, each, rng), free=False)


def holders(rows_per_stratum: IntArray, num_clients: int, each: int, rng: np.random.Generator) -> FloatArray:
    """Return shares in which every client holds `each` different strata and every stratum has a holder.

    A client takes the strata with most rows per holder; each is divided evenly among its holders. Needs
    each <= strata <= clients · each.
    """
    held = np.zeros((num_clients, len(rows_per_stratum)), dtype=bool)
    for client in range(num_clients):
        count = held.sum(axis=0)
        rank = np.lexsort((rng.random(len(count)), -rows_per_stratum / (count + 1), count > 0))
        held[client, rank[:each]] = True
    return columns_of(held.astype(np.float64))


ENTRY = Shards
