"""`iid`: every client gets the same number of random examples, up to a difference of one."""

import numpy as np

from fedray.config.partition import ExampleColumns, IntArray, PartitionConfig, Shares


class Iid(PartitionConfig):
    """Even shares of all examples."""

    def assign(
        self, examples: ExampleColumns, train: IntArray, num_clients: int | None, rng: np.random.Generator
    ) -> Shares:
        count = self.required_count(num_clients)
        return Shares(np.zeros(len(examples), dtype=np.int64), np.full((count, 1), 1 / count))


ENTRY = Iid
