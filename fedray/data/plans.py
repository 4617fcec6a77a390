"""The kinds of partition that deal strata by shares, each as one plan; and the names of clients."""

import re
from collections.abc import Sequence

import numpy as np

from fedray.config import PartitionConfig
from fedray.data.deal import Plan, columns_of, holders
from fedray.data.examples import Examples, IntArray
from fedray.errors import DataError, choices
from fedray.types import ClientId

NOBODY = -1
REGRESSION_BINS = 5


def draw_plan(
    examples: Examples, train: IntArray, config: PartitionConfig, num_clients: int | None, rng: np.random.Generator
) -> Plan:
    """Draw one plan of the configured kind.

    train: the training rows; a value that only other rows have is a stratum that nobody gets.

    Raises:
        DataError: the number of clients is missing or does not fit the number of classes.
    """
    if config.kind == "distinct_task":
        return _distinct_task(examples, train, num_clients)
    if num_clients is None:
        raise DataError(f"clients.count: the partition `{config.kind}` needs the number of clients")
    one_stratum = np.zeros(len(examples), dtype=np.int64)
    if config.kind == "iid":
        return Plan(one_stratum, np.full((num_clients, 1), 1 / num_clients), free=True)
    if config.kind == "quantity_skew":
        return Plan(one_stratum, rng.dirichlet([config.alpha] * num_clients)[:, None], free=True)
    if config.kind == "mixed_task":
        strata, tasks = _strata(examples.values("task"), train)
        mixtures = rng.dirichlet([config.alpha] * len(tasks), size=num_clients)
        return Plan(strata, columns_of(mixtures), free=True)
    strata, classes = _strata(_skewed_values(examples, config), train)
    if config.kind == "dirichlet":
        return Plan(strata, rng.dirichlet([config.alpha] * num_clients, size=len(classes)).T, free=True)
    _check_shards(len(classes), num_clients, config.classes_per_client)
    sizes = np.bincount(strata[train], minlength=len(classes))
    return Plan(strata, holders(sizes, num_clients, config.classes_per_client, rng), free=False)


def client_names(examples: Examples, train: IntArray, config: PartitionConfig, count: int) -> list[ClientId]:
    """Return the clients' names: their task's (distinct_task; alpha, beta, alpha_2, ...), else numbered."""
    if config.kind == "distinct_task":
        tasks = np.unique(examples.values("task")[train])
        return safe_names([str(tasks[index % len(tasks)]) for index in range(count)])
    return numbered(count)


def numbered(count: int) -> list[ClientId]:
    """Return client_000, client_001, ...: as wide as sorting by name needs."""
    width = max(3, len(str(count - 1)))
    return [f"client_{index:0{width}d}" for index in range(count)]


def safe_names(values: Sequence[str]) -> list[ClientId]:
    """Return a name per value that is safe as a file name, also where case does not count; names stay unique."""
    taken: set[str] = set()
    names = []
    for value in values:
        base = re.sub(r"[^A-Za-z0-9._-]+", "_", value).strip("._-")[:80] or "unnamed"
        name, number = base, 1
        while name.casefold() in taken:
            number += 1
            name = f"{base}_{number}"
        taken.add(name.casefold())
        names.append(name)
    return names


def _distinct_task(examples: Examples, train: IntArray, num_clients: int | None) -> Plan:
    """Client k holds task k mod T, in the order of the tasks' names; clients of one task share it evenly."""
    strata, tasks = _strata(examples.values("task"), train)
    count = num_clients or len(tasks)
    held = np.arange(count)[:, None] % len(tasks) == np.arange(len(tasks))
    shares = held[:, :count] / held[:, :count].sum(axis=0)
    return Plan(np.where(strata < shares.shape[1], strata, NOBODY), shares, free=False)


def _strata(values: np.ndarray, train: IntArray) -> tuple[IntArray, np.ndarray]:
    """Return the stratum of every row and the strata's values, sorted; NOBODY where no training row has the value."""
    known = np.unique(values[train])
    found = np.minimum(np.searchsorted(known, values), len(known) - 1)
    return np.where(known[found] == values, found, NOBODY), known


def _skewed_values(examples: Examples, config: PartitionConfig) -> np.ndarray:
    """Return what dirichlet and shards skew: the configured column, the class, or the label's fifth (regression)."""
    if config.column is not None:
        return examples.values(config.column)
    if examples.task == "regression":
        labels = examples.table["label"].to_numpy()
        edges = np.quantile(labels, np.linspace(0, 1, REGRESSION_BINS + 1)[1:-1])
        fifths: np.ndarray = np.digitize(labels, edges)
        return fifths
    if examples.task == "classification":
        return examples.field("label")
    if "label" in examples.columns.column_names:
        return examples.values("label")
    raise DataError(
        f"partition.column: the partition `{config.kind}` needs the column to skew on; the data has: "
        f"{choices(examples.columns.column_names)}"
    )


def _check_shards(num_classes: int, num_clients: int, each: int) -> None:
    if each > num_classes:
        raise DataError(f"partition.classes_per_client: {each}, but there are only {num_classes} classes")
    if num_clients * each < num_classes:
        raise DataError(
            f"partition.classes_per_client: {num_clients} clients with {each} classes each cannot hold all "
            f"{num_classes} classes; set it to at least {-(-num_classes // num_clients)}, or raise clients.count"
        )
