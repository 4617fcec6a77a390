"""Which client gets which examples, and which of them it keeps for validation and test.

Every draw is keyed by the seed and made over the examples in the order of their content, so that the same examples in
another order end up with the same clients. Official splits are dealt in the same proportions of client and stratum as
the training examples; splits that the source lacks are carved out of each client's own training examples.
"""

from collections.abc import Mapping

import numpy as np

from fedray.config import PartitionConfig
from fedray.data.deal import Plan, apportion, columns_of, fill, repair
from fedray.data.examples import Examples, IntArray
from fedray.data.holdout import classes_of, needed, split_holdout
from fedray.data.plans import NOBODY, client_names, draw_plan, safe_names
from fedray.errors import DataError, choices
from fedray.randomness import keyed_rng
from fedray.types import SPLITS, ClientId, Split

ATTEMPTS = 20
Partition = Mapping[ClientId, Mapping[Split, IntArray]]


def partition(examples: Examples, config: PartitionConfig, num_clients: int | None, seed: int) -> Partition:
    """Return the rows of every client and split; no row occurs twice.

    Rows that nobody gets: those of smaller natural clients than the `num_clients` largest, of tasks beyond the number
    of clients (distinct_task), and official validation or test rows of clients, tasks or (shards) classes without
    training examples, unless that is all of them: such a common file is dealt by the clients' sizes.

    Raises:
        DataError: too few examples for a client or a split, a missing column, or a number of clients that does not
            fit. The message says which settings to change.
    """
    order = np.argsort(examples.digests, kind="stable")
    examples = examples.take(order)
    split = examples.field("split")
    parts = {name: np.flatnonzero(split == name) for name in SPLITS}
    natural = config.kind in ("by_column", "by_file")
    clients, owner = (_natural if natural else _dealt)(examples, config, num_clients, seed, parts)
    owned = {name: _rows_by_owner(rows, owner, len(clients)) for name, rows in parts.items()}
    classes = classes_of(examples)
    result: dict[ClientId, Mapping[Split, IntArray]] = {}
    for index in sorted(range(len(clients)), key=clients.__getitem__):
        rows = {name: owned[name][index] for name in SPLITS}
        rows |= split_holdout(rows["train"], classes, config, parts, keyed_rng(seed, "carve", clients[index]))
        result[clients[index]] = {name: order[rows[name]] for name in SPLITS}
    return result


def _dealt(
    examples: Examples, config: PartitionConfig, num_clients: int | None, seed: int, parts: Mapping[Split, IntArray]
) -> tuple[list[ClientId], IntArray]:
    """Return the clients and every row's owner, for the kinds that deal strata by shares."""
    train = parts["train"]
    least = needed(config, parts)
    plan, counts = _drawn(examples, train, config, num_clients, seed, least)
    counts = repair(counts, least, plan.shares, plan.allowed())
    clients = client_names(examples, train, config, len(counts))
    _check_train(clients, counts.sum(axis=1), least, config, len(train))
    owner = np.full(len(examples), NOBODY)
    rng = keyed_rng(seed, "fill", config.kind)
    owner[train] = fill(counts, plan.strata[train], rng)
    for split in SPLITS[1:]:
        if len(rows := parts[split]):
            owner[rows] = _deal_official(plan.strata[rows], counts, plan.free, split, clients, rng)
    return clients, owner


def _drawn(
    examples: Examples, train: IntArray, config: PartitionConfig, num_clients: int | None, seed: int, least: int
) -> tuple[Plan, IntArray]:
    """Return the first draw in which the smallest client has `least` examples, or the best of several draws."""
    draws = []
    for attempt in range(ATTEMPTS):
        rng = keyed_rng(seed, "partition", config.kind, attempt)
        plan = draw_plan(examples, train, config, num_clients, rng)
        strata = plan.strata[train]
        sizes = np.bincount(strata[strata != NOBODY], minlength=plan.shares.shape[1])
        counts = apportion(plan.shares, sizes, rng)
        draws.append((plan, counts))
        if counts.sum(axis=1).min() >= least:
            return plan, counts
    return max(draws, key=lambda draw: int(draw[1].sum(axis=1).min()))


def _deal_official(
    strata: IntArray, counts: IntArray, free: bool, split: Split, clients: list[ClientId], rng: np.random.Generator
) -> IntArray:
    """Return the owners of an official split's rows, in the proportions of the training `counts` [clients, strata].

    Rows of a stratum without training examples make one more stratum, dealt by the clients' sizes.
    """
    totals = counts.sum(axis=1, keepdims=True)
    known = counts.sum(axis=0) > 0
    strata = np.where(known[strata] & (strata != NOBODY), strata, NOBODY)
    if free or (strata == NOBODY).all():
        strata = np.where(strata == NOBODY, counts.shape[1], strata)
    shares = columns_of(np.hstack([counts, totals]).astype(np.float64))
    sizes = np.bincount(strata[strata != NOBODY], minlength=shares.shape[1])
    plan = Plan(strata, shares, free)
    dealt = repair(apportion(shares, sizes, rng), 1, shares, plan.allowed())
    _check_official(clients, dealt.sum(axis=1), split, len(strata))
    return fill(dealt, strata, rng)


def _natural(
    examples: Examples, config: PartitionConfig, num_clients: int | None, seed: int, parts: Mapping[Split, IntArray]
) -> tuple[list[ClientId], IntArray]:
    """Return the clients and every row's owner, for clients that the data itself names."""
    column = config.column or ""
    values = examples.field("file") if config.kind == "by_file" else examples.values(column)
    names, sizes = np.unique(values[parts["train"]], return_counts=True)
    if num_clients is not None and num_clients > len(names):
        what = "the files" if config.kind == "by_file" else f"column {column!r}"
        raise DataError(
            f"clients.count: {num_clients} clients, but the training examples hold {len(names)} ({what}); "
            f"set clients.count to at most {len(names)}, or leave it out"
        )
    largest = np.sort(np.lexsort((names, -sizes))[:num_clients])
    names, kept_sizes = names[largest], sizes[largest]
    clients = safe_names([str(name) for name in names])
    least = needed(config, parts)
    _check_train(clients, kept_sizes, least, config, len(parts["train"]), int((sizes >= least).sum()))
    found = np.minimum(np.searchsorted(names, values), len(names) - 1)
    owner = np.where(names[found] == values, found, NOBODY)
    rng = keyed_rng(seed, "fill", config.kind)
    for split in SPLITS[1:]:
        if len(rows := parts[split]):
            if (owner[rows] == NOBODY).all():
                owner[rows] = _deal_official(owner[rows], kept_sizes[:, None], False, split, clients, rng)
            counts = np.bincount(owner[rows][owner[rows] != NOBODY], minlength=len(clients))
            _check_official(clients, counts, split, len(rows))
    return clients, owner


def _rows_by_owner(rows: IntArray, owner: IntArray, num_clients: int) -> list[IntArray]:
    """Return the rows of every client, in ascending order."""
    grouped = rows[np.argsort(owner[rows], kind="stable")]
    return np.split(grouped, np.searchsorted(owner[grouped], np.arange(num_clients + 1)))[1:-1]


def _check_train(
    clients: list[ClientId],
    sizes: IntArray,
    least: int,
    config: PartitionConfig,
    total: int,
    large_enough: int | None = None,
) -> None:
    """Refuse clients with fewer than `least` training examples (before validation and test are carved out)."""
    poor = [f"{client} ({size})" for client, size in zip(clients, sizes, strict=True) if size < least]
    if poor:
        fewer = f" to at most {large_enough}, which keeps the largest" if large_enough else ""
        raise DataError(
            f"partition {config.kind}: every client needs {least} examples, so that {config.min_examples} remain for "
            f"training beside its own validation and test; of {total} for {len(clients)} clients, too few got "
            f"{choices(poor, 5)}; lower clients.count{fewer}, partition.min_examples or the skew "
            "(partition.alpha, partition.classes_per_client), or keep more (data.max_examples, data.max_per_class)"
        )


def _check_official(clients: list[ClientId], sizes: IntArray, split: Split, total: int) -> None:
    """Refuse clients without any example of an official split."""
    without = [client for client, size in zip(clients, sizes, strict=True) if size == 0]
    if without:
        raise DataError(
            f"partition: {len(without)} of {len(clients)} clients get none of the {total} {split} examples: "
            f"{choices(without, 5)}; lower clients.count, keep more (data.max_test_examples), or leave the source's "
            f"{split} split out: it is then carved out of each client's training examples"
        )
