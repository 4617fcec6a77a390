"""Shards that travel together."""

import pickle

import numpy as np
import pyarrow as pa
import pytest

from fedray.data.batches import batches
from fedray.data.shards import Shard, ShardPack
from fedray.types import SPLITS


def shard(client: str, sizes: tuple[int, int, int]) -> Shard:
    """Examples whose tokens tell whose they are, of 1, 2, 3, ... tokens."""
    tables = {}
    for split, size in zip(SPLITS, sizes, strict=True):
        rows = [[ord(client)] * (index + 1) for index in range(size)]
        columns = {"input_ids": pa.array(rows, pa.list_(pa.int32())), "labels": pa.array(range(size), pa.int32())}
        tables[split] = pa.table(columns)
    return Shard(client, tables)


SHARDS = [shard("a", (3, 0, 2)), shard("b", (0, 0, 0)), shard("c", (5, 1, 0))]


@pytest.mark.parametrize("travelled", [False, True])
def test_everybody_gets_their_own_back(travelled: bool) -> None:
    pack = ShardPack.of(SHARDS)
    pack = pickle.loads(pickle.dumps(pack)) if travelled else pack
    for mine in SHARDS:
        found = pack[mine.client]
        assert found.client == mine.client
        for split in SPLITS:
            assert found.tables[split].equals(mine.tables[split])
            assert found.num_examples(split) == mine.num_examples(split)
    with pytest.raises(KeyError):
        pack["d"]


def test_batches_of_a_part_of_a_table() -> None:
    pack = ShardPack.of(SHARDS)
    mine, packed = (
        [
            {name: tensor.tolist() for name, tensor in batch.items()}
            for batch in batches(table, 2, 0, np.array([4, 0, 2]))
        ]
        for table in (SHARDS[2].tables["train"], pack["c"].tables["train"])
    )
    assert packed == mine
    assert packed[0]["input_ids"] == [[99] * 5, [99, 0, 0, 0, 0]]
