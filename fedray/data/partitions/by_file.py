"""`by_file`: every file is a client, or every client that a file names ({client: rows}). In `docstrings` a file is a
library, in `synthetic` a generated client, and in `several` a part."""

import numpy as np

from fedray.config.partition import ExampleColumns, IntArray, NaturalClients, PartitionConfig


class ByFile(PartitionConfig):
    """The files are the clients."""

    def assign(
        self, examples: ExampleColumns, train: IntArray, num_clients: int | None, rng: np.random.Generator
    ) -> NaturalClients:
        return NaturalClients(examples.field("file"), "the files")


ENTRY = ByFile
