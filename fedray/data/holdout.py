"""Holdout splits: validation and test examples from a client's own training examples, where the source has none."""

from collections.abc import Mapping

import numpy as np

from fedray.config import PartitionConfig
from fedray.config.partition import IntArray
from fedray.data.examples import Examples
from fedray.types import Split


def split_holdout(
    train: IntArray,
    classes: IntArray,
    config: PartitionConfig,
    parts: Mapping[Split, IntArray],
    rng: np.random.Generator,
) -> dict[Split, IntArray]:
    """Return what remains of a client's training rows, and its holdout splits, each ascending and stratified by class.

    Args:
        train: rows of the client's training examples.
        classes: class of every row of the data.
        config: which shares are held out.
        parts: rows of every split of the source; only missing splits are held out.
        rng: draws the rows.
    """
    rows: dict[Split, IntArray] = {"train": train}
    for split, count in _sizes(len(train), config, parts).items():
        rows[split] = _stratified(rows["train"], classes, count, rng)
        rows["train"] = np.setdiff1d(rows["train"], rows[split], assume_unique=True)
    return rows


def needed(config: PartitionConfig, parts: Mapping[Split, IntArray]) -> int:
    """Return the fewest examples that leave a client min_examples for training."""
    count = config.min_examples
    while (missing := config.min_examples + sum(_sizes(count, config, parts).values()) - count) > 0:
        count += missing
    return count


def classes_of(examples: Examples) -> IntArray:
    """Return a number per row by which to stratify: its task and, within the task, its class or regression label."""
    tasks = np.unique(examples.values("task"), return_inverse=True)[1]
    if examples.task == "causal_lm":
        return tasks
    labels = examples.table["label"].to_numpy() if examples.task == "regression" else examples.field("label")
    values, ranks = np.unique(labels, return_inverse=True)
    return tasks * len(values) + ranks


def _sizes(count: int, config: PartitionConfig, parts: Mapping[Split, IntArray]) -> dict[Split, int]:
    """Return how many of `count` examples go to test, then to validation: at least one where any are wanted."""
    sizes: dict[Split, int] = {}
    fractions: dict[Split, float] = {"test": config.test_fraction, "validation": config.validation_fraction}
    for split, fraction in fractions.items():
        if not len(parts[split]) and fraction > 0:
            sizes[split] = max(1, int(fraction * count + 0.5))
            count -= sizes[split]
    return sizes


def _stratified(rows: IntArray, classes: IntArray, count: int, rng: np.random.Generator) -> IntArray:
    """Return `count` of `rows`, ascending, at even distances through the rows ordered by class."""
    by_class = rows[np.lexsort((rng.random(len(rows)), classes[rows]))]
    picked = np.floor((np.arange(count) + rng.random()) * len(rows) / count).astype(np.int64)
    return np.sort(by_class[picked])
