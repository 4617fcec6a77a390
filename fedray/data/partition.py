"""Which client gets which examples, and which of them it keeps for validation and test.

Every draw is keyed by the seed and made over the examples in the order of their content, so the assignment does not
depend on the order in which examples are read. Official splits are assigned in the same proportions of client and
stratum as the training examples; splits that the source lacks are taken from each client's own training examples.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from fedray.config import NaturalClients, PartitionConfig, Shares
from fedray.config.partition import UNASSIGNED, IntArray
from fedray.data.client_names import numbered, unique_names
from fedray.data.examples import Examples
from fedray.data.holdout import classes_of, needed, split_holdout
from fedray.data.strata import apportion, columns_of, fill, repair
from fedray.errors import DataError, choices
from fedray.randomness import keyed_rng
from fedray.types import SPLITS, ClientId, Split

ATTEMPTS = 20
Partition = Mapping[ClientId, Mapping[Split, IntArray]]
Parts = Mapping[Split, IntArray]
"""Rows of every split of the source; empty where the source lacks the split."""


def partition(examples: Examples, config: PartitionConfig, num_clients: int | None, seed: int) -> Partition:
    """Return the rows of every client and split; no row occurs twice.

    Rows without a client: those of smaller natural clients than the `num_clients` largest, of tasks beyond the number
    of clients (distinct_task), and official validation or test rows of clients, tasks or (shards) classes without
    training examples, unless that is all of them: such a common file is assigned by the clients' sizes.

    Args:
        examples: of all splits.
        config: the partitioner.
        num_clients: `clients.count`.
        seed: of the experiment.

    Raises:
        DataError: too few examples for a client or a split, a missing column, or a number of clients that does not
            fit. The message says which settings to change.
    """
    order = np.argsort(examples.digests, kind="stable")
    examples = examples.take(order)
    split = examples.field("split")
    parts = {name: np.flatnonzero(split == name) for name in SPLITS}
    clients, owner = _assigned(examples, config, num_clients, seed, parts)
    owned = {name: _rows_by_owner(rows, owner, len(clients)) for name, rows in parts.items()}
    classes = classes_of(examples)
    result: dict[ClientId, Mapping[Split, IntArray]] = {}
    for index in sorted(range(len(clients)), key=clients.__getitem__):
        rows = {name: owned[name][index] for name in SPLITS}
        rng = keyed_rng(seed, "carve", clients[index])  # another key would change the results of every seed
        rows |= split_holdout(rows["train"], classes, config, parts, rng)
        result[clients[index]] = {name: order[rows[name]] for name in SPLITS}
    return result


def _assigned(
    examples: Examples, config: PartitionConfig, num_clients: int | None, seed: int, parts: Parts
) -> tuple[list[ClientId], IntArray]:
    """Return the clients, and the index of every row's client.

    Shares are drawn until the smallest client has enough examples; of several draws, the best one counts.
    """
    train, least = parts["train"], needed(config, parts)
    fill_rng = keyed_rng(seed, "fill", config.name)
    draws: list[tuple[int, Shares, IntArray]] = []
    for attempt in range(ATTEMPTS):
        rng = keyed_rng(seed, "partition", config.name, attempt)
        found = config.assign(examples, train, num_clients, rng)
        given = found.values if isinstance(found, NaturalClients) else found.strata
        if len(given) != len(examples):
            raise DataError(f"partition {config.name}: assigns {len(given)} examples, but the data has {len(examples)}")
        if isinstance(found, NaturalClients):
            _check_named(found, examples, parts)
            return _by_nature(found, config, num_clients, parts, fill_rng)
        strata = found.strata[train]
        sizes = np.bincount(strata[strata != UNASSIGNED], minlength=found.shares.shape[1])
        counts = apportion(found.shares, sizes, rng)
        smallest = int(counts.sum(axis=1).min())
        draws.append((smallest, found, counts))
        if smallest >= least:
            break
    _, shares, counts = max(draws, key=lambda draw: draw[0])
    return _by_shares(shares, counts, config, parts, fill_rng)


def _by_shares(
    found: Shares, counts: IntArray, config: PartitionConfig, parts: Parts, rng: np.random.Generator
) -> tuple[list[ClientId], IntArray]:
    """Return the clients and every row's owner, given how many training examples of each stratum they get."""
    train, least = parts["train"], needed(config, parts)
    counts = repair(counts, least, found.shares, found.allowed())
    clients = numbered(len(counts)) if found.names is None else unique_names(found.names)
    _check_train(clients, counts.sum(axis=1), least, config, len(train))
    owner = np.full(len(found.strata), UNASSIGNED)
    owner[train] = fill(counts, found.strata[train], rng)
    for split in SPLITS[1:]:
        if len(rows := parts[split]):
            owner[rows] = _official(found.strata[rows], counts, found.free, split, clients, rng)
    return clients, owner


def _by_nature(
    found: NaturalClients,
    config: PartitionConfig,
    num_clients: int | None,
    parts: Parts,
    rng: np.random.Generator,
) -> tuple[list[ClientId], IntArray]:
    """Return the clients and every row's owner, for clients that the data itself names."""
    names, sizes = np.unique(found.values[parts["train"]], return_counts=True)
    if num_clients is not None and num_clients > len(names):
        raise DataError(
            f"clients.count: {num_clients} clients, but the training examples hold {len(names)} ({found.origin}); "
            f"set clients.count to at most {len(names)}, or leave it out"
        )
    largest = np.sort(np.lexsort((names, -sizes))[:num_clients])
    names, kept_sizes = names[largest], sizes[largest]
    clients = [str(name) for name in names]
    least = needed(config, parts)
    _check_train(clients, kept_sizes, least, config, len(parts["train"]), int((sizes >= least).sum()))
    position = np.minimum(np.searchsorted(names, found.values), len(names) - 1)
    owner = np.where(names[position] == found.values, position, UNASSIGNED)
    for split in SPLITS[1:]:
        if len(rows := parts[split]):
            if (owner[rows] == UNASSIGNED).all():
                owner[rows] = _official(owner[rows], kept_sizes[:, None], False, split, clients, rng)
            counts = np.bincount(owner[rows][owner[rows] != UNASSIGNED], minlength=len(clients))
            _check_official(clients, counts, split, len(rows))
    return clients, owner


def _official(
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
    sizes = np.bincount(strata[strata != UNASSIGNED], minlength=shares.shares.shape[1])
    assigned = repair(apportion(shares.shares, sizes, rng), 1, shares.shares, shares.allowed())
    _check_official(clients, assigned.sum(axis=1), split, len(strata))
    return fill(assigned, strata, rng)


def _rows_by_owner(rows: IntArray, owner: IntArray, num_clients: int) -> list[IntArray]:
    """Return the rows of every client, in ascending order."""
    grouped = rows[np.argsort(owner[rows], kind="stable")]
    return np.split(grouped, np.searchsorted(owner[grouped], np.arange(num_clients + 1)))[1:-1]


def _check_named(found: NaturalClients, examples: Examples, parts: Parts) -> None:
    """Refuse examples without a client. Only a validation or test split may have none at all: it is then common to all
    clients."""
    for split, rows in parts.items():
        nameless = rows[found.values[rows] == ""]
        if len(nameless) and (split == "train" or len(nameless) < len(rows)):
            first = min(nameless, key=lambda row: tuple(examples.origins[row]))
            raise DataError(
                f"{examples.place(first)}: no client ({found.origin}: nothing); {len(nameless)} of {len(rows)} {split} "
                "examples have none; name one in each, or leave these rows out"
            )


def _check_train(
    clients: Sequence[ClientId],
    sizes: IntArray,
    least: int,
    config: PartitionConfig,
    total: int,
    large_enough: int | None = None,
) -> None:
    """Refuse clients with fewer than `least` training examples (before the holdout splits are taken from them)."""
    poor = [f"{client} ({size})" for client, size in zip(clients, sizes, strict=True) if size < least]
    if poor:
        fewer = f" to at most {large_enough}, which keeps the largest" if large_enough else ""
        raise DataError(
            f"partition {config.name}: every client needs {least} examples, so that {config.min_examples} remain for "
            f"training in addition to its own validation and test; of {total} for {len(clients)} clients, too few got "
            f"{choices(poor, 5)}; lower clients.count{fewer}, partition.min_examples or the skew "
            "(partition.alpha, partition.classes_per_client), or keep more (data.max_examples, data.max_per_class)"
        )


def _check_official(clients: Sequence[ClientId], sizes: IntArray, split: Split, total: int) -> None:
    """Refuse clients without any example of an official split."""
    without = [client for client, size in zip(clients, sizes, strict=True) if size == 0]
    if without:
        raise DataError(
            f"partition: {len(without)} of {len(clients)} clients get none of the {total} {split} examples: "
            f"{choices(without, 5)}; lower clients.count, keep more (data.max_test_examples), or leave the source's "
            f"{split} split out: it is then taken from each client's training examples"
        )
