"""Which client gets which examples, and which of them it keeps for validation and test.

Every draw is keyed by the seed and made over the examples in the order of their content, so the assignment does not
depend on the order in which examples are read. Official splits are assigned as `fedray.data.official` says; splits that
the source lacks are taken from each client's own training examples.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from fedray.config import NaturalClients, PartitionConfig, Shares
from fedray.config.partition import UNASSIGNED, IntArray
from fedray.data.client_names import numbered, unique_names
from fedray.data.examples import Examples
from fedray.data.holdout import classes_of, needed, split_holdout
from fedray.data.official import Parts, alike, check_official, divided, independent, official_splits
from fedray.data.strata import apportion, fill, repair
from fedray.errors import DataError, choices
from fedray.randomness import keyed_rng
from fedray.types import SPLITS, ClientId, Split

ATTEMPTS = 20
Partition = Mapping[ClientId, Mapping[Split, IntArray]]


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
    official, enough = official_splits(parts), needed(config, parts)
    if config.source_splits != "alike" and not official:
        raise DataError(
            f"partition.source_splits: {config.source_splits!r} is about the source's own validation and test splits, "
            "but it has none: they are taken from each client's training examples; name such a split, or leave it out"
        )
    rows = parts["train"]
    if config.source_splits == "pooled":
        rows = np.sort(np.concatenate(list(parts.values())))
        enough += len(official)
    fill_rng = keyed_rng(seed, "fill", config.name)
    draws: list[tuple[int, Shares, IntArray]] = []
    for attempt in range(ATTEMPTS):
        rng = keyed_rng(seed, "partition", config.name, attempt)
        found = config.assign(examples, rows, num_clients, rng)
        given = found.values if isinstance(found, NaturalClients) else found.strata
        if len(given) != len(examples):
            raise DataError(f"partition {config.name}: assigns {len(given)} examples, but the data has {len(examples)}")
        if isinstance(found, NaturalClients):
            _check_named(found, examples, config, parts)
            return _by_nature(found, config, num_clients, parts, fill_rng)
        strata = found.strata[rows]
        sizes = np.bincount(strata[strata != UNASSIGNED], minlength=found.shares.shape[1])
        counts = apportion(found.shares, sizes, rng)
        smallest = int(counts.sum(axis=1).min())
        draws.append((smallest, found, counts))
        if smallest >= enough:
            break
    _, shares, counts = max(draws, key=lambda draw: draw[0])
    counts = repair(counts, enough, shares.shares, shares.allowed())
    clients = numbered(len(counts)) if shares.names is None else unique_names(shares.names)
    if config.source_splits == "pooled":
        return clients, _by_pool(shares.strata, counts, clients, config, parts, fill_rng)
    owner = _by_training(shares, counts, clients, config, parts, fill_rng)
    if config.source_splits == "independent":
        for split in official:
            owner[parts[split]] = independent(examples, parts[split], config, split, clients, seed)
    return clients, owner


def _by_training(
    found: Shares,
    counts: IntArray,
    clients: Sequence[ClientId],
    config: PartitionConfig,
    parts: Parts,
    rng: np.random.Generator,
) -> IntArray:
    """Return every row's owner, given how many training examples of each stratum the clients get; official splits are
    assigned alike, or not at all."""
    train, least = parts["train"], needed(config, parts)
    _check_train(clients, counts.sum(axis=1), least, config, len(train))
    owner = np.full(len(found.strata), UNASSIGNED)
    owner[train] = fill(counts, found.strata[train], rng)
    if config.source_splits == "alike":
        for split in official_splits(parts):
            rows = parts[split]
            owner[rows] = alike(found.strata[rows], counts, found.free, split, clients, rng)
    return owner


def _by_pool(
    strata: IntArray,
    counts: IntArray,
    clients: Sequence[ClientId],
    config: PartitionConfig,
    parts: Parts,
    rng: np.random.Generator,
) -> IntArray:
    """Return every row's owner, given how many examples of each stratum, of all splits together, the clients get."""
    least = needed(config, parts)
    held = {split: strata[rows][strata[rows] != UNASSIGNED] for split, rows in parts.items()}
    sizes = {split: np.bincount(of_split, minlength=counts.shape[1]) for split, of_split in held.items()}
    owner = np.full(len(strata), UNASSIGNED)
    for split, of_split in divided(counts, sizes, least, rng).items():
        rows = parts[split]
        if split == "train":
            _check_train(clients, of_split.sum(axis=1), least, config, len(rows))
        else:
            check_official(clients, of_split.sum(axis=1), split, len(rows))
        owner[rows] = fill(of_split, strata[rows], rng)
    return owner


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
    for split in official_splits(parts):
        rows = parts[split]
        if (owner[rows] == UNASSIGNED).all():
            owner[rows] = alike(owner[rows], kept_sizes[:, None], False, split, clients, rng)
        counts = np.bincount(owner[rows][owner[rows] != UNASSIGNED], minlength=len(clients))
        check_official(clients, counts, split, len(rows))
    return clients, owner


def _rows_by_owner(rows: IntArray, owner: IntArray, num_clients: int) -> list[IntArray]:
    """Return the rows of every client, in ascending order."""
    grouped = rows[np.argsort(owner[rows], kind="stable")]
    return np.split(grouped, np.searchsorted(owner[grouped], np.arange(num_clients + 1)))[1:-1]


def _check_named(found: NaturalClients, examples: Examples, config: PartitionConfig, parts: Parts) -> None:
    """Refuse examples without a client. Only a validation or test split may have none at all: it is then common to all
    clients. Refuse draws of official splits: the data names their clients, too."""
    if config.source_splits != "alike":
        raise DataError(
            f"partition.source_splits: {config.source_splits!r} is a draw, but the clients of the partition "
            f"`{config.name}` are those that the data names; leave it out"
        )
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
