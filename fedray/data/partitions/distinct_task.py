"""`distinct_task`: every client has a single task."""

import numpy as np

from fedray.config.partition import UNASSIGNED, ExampleColumns, IntArray, PartitionConfig, Shares
from fedray.data.strata import strata_of


class DistinctTask(PartitionConfig):
    """Client k holds task k mod T, in the order of the tasks' names; clients of one task share it evenly. Without
    `clients.count` there is one client per task."""

    def assign(
        self, examples: ExampleColumns, train: IntArray, num_clients: int | None, rng: np.random.Generator
    ) -> Shares:
        strata, tasks = strata_of(examples.values("task"), train)
        count = num_clients or len(tasks)
        held = np.arange(count)[:, None] % len(tasks) == np.arange(len(tasks))
        shares = held[:, :count] / held[:, :count].sum(axis=0)
        names = [str(tasks[index % len(tasks)]) for index in range(count)]
        return Shares(np.where(strata < shares.shape[1], strata, UNASSIGNED), shares, free=False, names=names)


ENTRY = DistinctTask
