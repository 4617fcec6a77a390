"""`by_file`: every file is a client; in `docstrings` a file is a library, and in `synthetic` a generated client."""

import numpy as np

from fedray.config.partition import ExampleColumns, IntArray, NaturalClients, PartitionConfig


class ByFile(PartitionConfig):
    """The files are the clients."""

    def assign(
        self, examples: ExampleColumns, train: IntArray, num_clients: int | None, rng: np.random.Generator
    ) -> NaturalClients:
        return NaturalClients(examples.field("file"), "the files")


ENTRY = ByFile
