"""Official splits: validation and test examples that the source itself has, and how clients get them.

`partition.source_splits` chooses: `alike` follows each client's training examples, `independent` draws anew, and
`pooled` draws once for the training and official examples together, as the published code of FedHFT does.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from fedray.config import PartitionConfig, Shares
from fedray.config.partition import UNASSIGNED, IntArray
from fedray.data.examples import Examples
from fedray.data.strata import apportion, columns_of, fill, repair
from fedray.errors import DataError, choices
from fedray.randomness import keyed_rng
from fedray.types import SPLITS, ClientId, Split

Parts = Mapping[Split, IntArray]
"""Rows of every split of the source; empty where the source lacks the split."""


def official_splits(parts: Parts) -> list[Split]:
    """Return the validation and test splits that the source has."""
    return [split for split in SPLITS[1:] if len(parts[split])]


def alike(
    strata: IntArray, counts: IntArray, free: bool, split: Split, clients: Sequence[ClientId], rng: np.random.Generator
) -> IntArray:
    """Return the owners of an official split's rows, in the proportions of the training `counts` [clients, strata].

    Rows of a stratum without training examples make one more stratum, assigned by the clients' sizes.
    """
    totals = counts.sum(axis=1, keepdims=True)
    known = counts.sum(axis=0) > 0
    strata = np.where(known[strata] & (strata != UNASSIGNED), strata, UNASSIGNED)
    if free or (strata == UNASSIGNED).all():
        strata = np.where(strata == UNASSIGNED, counts.shape[1], strata)
    shares = Shares(strata, columns_of(np.hstack([counts, totals]).astype(np.float64)), free)
    return _apportioned(shares, strata, split, clients, rng)


def independent(
    examples: Examples, rows: IntArray, config: PartitionConfig, split: Split, clients: Sequence[ClientId], seed: int
) -> IntArray:
    """Return the owners of an official split's rows by a draw of their own.

    Args:
        examples: of all splits.
        rows: of the split.
        clients: of the training examples.

    Raises:
        DataError: the draw makes other clients, which is so where a client is named after its task.
    """
    rng = keyed_rng(seed, "partition", config.name, split)
    found = config.assign(examples, rows, len(clients), rng)
    if not isinstance(found, Shares) or found.names is not None or len(found.shares) != len(clients):
        raise DataError(
            f"partition.source_splits: `independent` draws other clients for {split} than for training, but those of "
            f"the partition `{config.name}` are named after their data; leave it out"
        )
    return _apportioned(found, found.strata[rows], split, clients, rng)


def divided(counts: IntArray, sizes: Mapping[Split, IntArray], least: int, rng: np.random.Generator) -> Parts:
    """Return which examples of the pooled `counts` belong to which split: int [clients, strata] by split.

    The pool's examples are shuffled within a stratum, so that a client's part of a split is a draw without replacement
    (multivariate hypergeometric) from what the client has. A client without any example of an official split then
    exchanges a training example for one of another client; so does a client with too few training examples.

    Args:
        counts: int [clients, strata], examples of all splits together.
        sizes: int [strata], examples of every split.
        least: fewest training examples of a client.
    """
    rest, found = counts, {}
    for split in reversed(SPLITS[1:]):
        if sizes[split].sum():
            draws = [
                rng.multivariate_hypergeometric(*pair, method="marginals")
                for pair in zip(rest.T, sizes[split], strict=True)
            ]
            drawn = np.stack(draws, axis=1)
            found[split] = repair(drawn, 1, columns_of(rest.astype(np.float64)), rest > 0)
            rest = rest - found[split]
    found["train"] = repair(rest, least, columns_of(counts.astype(np.float64)), counts > 0)
    return found


def check_official(clients: Sequence[ClientId], sizes: IntArray, split: Split, total: int) -> None:
    """Refuse clients without any example of an official split.

    Raises:
        DataError: there are such clients.
    """
    without = [client for client, size in zip(clients, sizes, strict=True) if size == 0]
    if without:
        raise DataError(
            f"partition: {len(without)} of {len(clients)} clients get none of the {total} {split} examples: "
            f"{choices(without, 5)}; lower clients.count, keep more (data.max_test_examples), or leave the source's "
            f"{split} split out: it is then taken from each client's training examples"
        )


def _apportioned(
    shares: Shares, strata: IntArray, split: Split, clients: Sequence[ClientId], rng: np.random.Generator
) -> IntArray:
    """Return the owners of rows with these strata, by shares; every client gets at least one row."""
    sizes = np.bincount(strata[strata != UNASSIGNED], minlength=shares.shares.shape[1])
    assigned = repair(apportion(shares.shares, sizes, rng), 1, shares.shares, shares.allowed())
    check_official(clients, assigned.sum(axis=1), split, len(strata))
    return fill(assigned, strata, rng)
