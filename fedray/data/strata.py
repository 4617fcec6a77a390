"""Strata: the stratum of every example, and whole numbers of examples from shares of strata."""

import numpy as np
import numpy.typing as npt

from fedray.config.partition import UNASSIGNED, ExampleColumns, FloatArray, IntArray
from fedray.errors import DataError, choices

REGRESSION_BINS = 5


def strata_of(values: np.ndarray, train: IntArray) -> tuple[IntArray, np.ndarray]:
    """Return strata by the values of a column.

    Args:
        values: [examples], the value of every example.
        train: rows of the training examples.

    Returns:
        The stratum of every example, UNASSIGNED where no training example has its value; and the value of every
        stratum, sorted.
    """
    known = np.unique(values[train])
    found = np.minimum(np.searchsorted(known, values), len(known) - 1)
    return np.where(known[found] == values, found, UNASSIGNED), known


def skewed_values(examples: ExampleColumns, column: str | None, name: str) -> np.ndarray:
    """Return the values that a label skew is about: the given column, the class, or the label's fifth (regression).

    Args:
        examples: of all splits.
        column: name of a column; None: the label.
        name: the partitioner, for messages.

    Raises:
        DataError: no such column, or neither a column nor a label.
    """
    if column is not None:
        return examples.values(column)
    if examples.task == "regression":
        labels = examples.field("label").astype(np.float64)
        edges = np.quantile(labels, np.linspace(0, 1, REGRESSION_BINS + 1)[1:-1])
        fifths: np.ndarray = np.digitize(labels, edges)
        return fifths
    if examples.task == "classification":
        return examples.field("label")
    if "label" in examples.column_names:
        return examples.values("label")
    raise DataError(
        f"partition.column: the partition `{name}` needs the column to skew on; the data has: "
        f"{choices(examples.column_names)}"
    )


def apportion(shares: FloatArray, sizes: IntArray, rng: np.random.Generator) -> IntArray:
    """Return whole numbers of examples near shares · sizes: [clients, strata]; every column adds up to its size.

    Systematic rounding: one random offset per stratum, so that every count is a neighbour of its exact value and
    equal to it on average.
    """
    edges = np.floor(np.cumsum(shares, axis=0) * sizes + rng.random(len(sizes)))
    edges[-1] = sizes  # what rounding errors of the cumulative sum would miss
    return np.diff(np.minimum(edges, sizes), axis=0, prepend=0).astype(np.int64)


def repair(counts: IntArray, minimum: int, shares: FloatArray, allowed: npt.NDArray[np.bool_]) -> IntArray:
    """Return counts in which poor clients got examples from the largest ones, up to `minimum` each where possible.

    An example comes from the stratum in which the poor client has the largest share, among those the donor can give.
    A donor keeps at least `minimum` examples, and no client receives a stratum that it is not allowed.

    Args:
        counts: int [clients, strata].
        minimum: fewest examples of a client.
        shares: [clients, strata].
        allowed: bool [clients, strata], which client may hold which stratum.
    """
    counts = counts.copy()
    totals = counts.sum(axis=1)
    for poor in np.argsort(totals, kind="stable"):
        while totals[poor] < minimum:
            donors = (donor for donor in np.argsort(-totals, kind="stable") if totals[donor] > minimum)
            donor = next((donor for donor in donors if (allowed[poor] & (counts[donor] > 0)).any()), None)
            if donor is None:
                break
            # Among equal shares, the stratum of which the donor has most.
            score = shares[poor] + 1e-9 * counts[donor] / totals[donor]
            stratum = np.argmax(np.where(allowed[poor] & (counts[donor] > 0), score, -1.0))
            counts[donor, stratum] -= 1
            counts[poor, stratum] += 1
            totals[donor] -= 1
            totals[poor] += 1
    return counts


def fill(counts: IntArray, strata: IntArray, rng: np.random.Generator) -> IntArray:
    """Return the owner of every example, UNASSIGNED where there is none, drawn so that client k owns counts[k, c]
    examples of stratum c."""
    owner = np.full(len(strata), UNASSIGNED, dtype=np.int64)
    clients = np.arange(len(counts))
    for stratum in range(counts.shape[1]):
        rows = np.flatnonzero(strata == stratum)
        owner[rng.permutation(rows)] = np.repeat(clients, counts[:, stratum])
    return owner


def columns_of(weights: FloatArray) -> FloatArray:
    """Return weights [clients, strata] scaled so that every column adds up to 1; an all-zero column becomes even."""
    totals = weights.sum(axis=0)
    even = np.full_like(weights, 1 / len(weights))
    shares: FloatArray = np.divide(weights, totals, out=even, where=totals > 0)
    return shares
