"""What the other packages get from `fedray.data`: one shard of tokenised examples per client."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fedray.types import IGNORED, SPLITS, ClientId, Role, Split, Task

GROUP = "group"
"""Column of a table with several tasks or named test sets, which are evaluated apart as well."""

CHOICES = "choices"
"""Column of a table whose examples have options that are ranked by their likelihood."""

NOT_READ = ("answer", GROUP, CHOICES)
"""Columns that no model reads."""


TOKENS = pa.list_(pa.int32())
CHOICE = pa.struct([("input_ids", TOKENS), ("start", pa.int32()), ("text", pa.string()), ("right", pa.bool_())])
"""One option: the tokens of prompt and option, where those of the option begin, its text, whether it is the right
one."""


@dataclass(frozen=True)
class Shard:
    """One client's tokenised examples.

    Each table has `input_ids` (list<int32>) and `labels`: int32 class index (classification), float32 (regression) or
    list<int32> of the same length as input_ids with -100 where no loss is taken (causal_lm: the prompt, and in
    conversations all but the assistant's turns); sentence pairs also
    `token_type_ids` (list<int32>) where the tokenizer makes them; causal_lm also `answer` (string, the reference text).
    Validation and test have a column `group` (string) where some client has examples of several tasks or test sets, and
    a column `choices` (list<CHOICE>) where a metric ranks options.
    """

    client: ClientId
    tables: Mapping[Split, pa.Table]

    def num_examples(self, split: Split = "train") -> int:
        return int(self.tables[split].num_rows)


def last_answer(labels: npt.NDArray[np.integer]) -> int | None:
    """Return where the last answer of a causal_lm example begins; None if nothing is learned from the example. Nothing
    predicts a text's first token, whatever its label.

    Args:
        labels: [tokens].
    """
    scored = labels != IGNORED
    scored[:1] = False
    starts = np.flatnonzero(scored[1:] & ~scored[:-1]) + 1
    return int(starts[-1]) if len(starts) else None


@dataclass(frozen=True)
class ShardPack:
    """Some clients' shards as one table per split: sent and read as a whole, in the time of one shard.

    Attributes:
        tables: the rows of all clients, by split.
        rows: where each client's rows begin and end.
    """

    tables: Mapping[Split, pa.Table]
    rows: Mapping[ClientId, Mapping[Split, tuple[int, int]]]

    @classmethod
    def of(cls, shards: Sequence[Shard]) -> "ShardPack":
        """Return at least one shard, all with the same columns, as a pack."""
        tables = {
            split: pa.concat_tables([shard.tables[split] for shard in shards]).combine_chunks() for split in SPLITS
        }
        ends = dict.fromkeys(SPLITS, 0)
        rows: dict[ClientId, dict[Split, tuple[int, int]]] = {}
        for shard in shards:
            starts = dict(ends)
            ends = {split: ends[split] + shard.num_examples(split) for split in SPLITS}
            rows[shard.client] = {split: (starts[split], ends[split]) for split in SPLITS}
        return cls(tables, rows)

    def __getitem__(self, client: ClientId) -> Shard:
        rows = self.rows[client]
        return Shard(client, {split: self.tables[split].slice(a, b - a) for split, (a, b) in rows.items()})


@dataclass(frozen=True)
class FederatedData:
    """Every client's shard, and what all share.

    Attributes:
        task: what is learned from the examples.
        shards: of all clients.
        label_names: class names in the order of their indices; empty for regression and causal_lm.
        pad_token_id: token that fills a batch's shorter examples.
        vocab_size: number of tokens of the tokenizer.
        latent_group: planted group of each client (sources with a `group_column`), for checking cluster recovery.
        fingerprint: SHA-256 of the examples' content and their assignment to clients and splits.
        common: the common test set, with columns as in `Shard`; None if there is none.
        end_token_ids: tokens that end a generated answer (causal_lm).
        notes: what a user should know before training, a sentence each: what was detected, cut or looks wrong.
        parts: examples of every part of a source with several, by split, or common; those of all clients.
        client_parts: examples of every part of such a source, by client and split.
    """

    task: Task
    shards: Mapping[ClientId, Shard]
    label_names: tuple[str, ...]
    pad_token_id: int
    vocab_size: int
    latent_group: Mapping[ClientId, int]
    fingerprint: str
    common: pa.Table | None = None
    end_token_ids: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    parts: Mapping[str, Mapping[Role, int]] = field(default_factory=dict)
    client_parts: Mapping[ClientId, Mapping[Split, Mapping[str, int]]] = field(default_factory=dict)
