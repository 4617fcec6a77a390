"""Holdout splits: their sizes and their strata."""

from collections import Counter
from collections.abc import Callable

import numpy as np
from partitioning import assign, histogram

from fedray.data.examples import Examples
from fedray.data.holdout import needed
from fedray.data.partitions.iid import Iid

Labelled = Callable[..., Examples]


def test_holdout_splits_are_stratified_by_class(labelled: Labelled) -> None:
    """40 a, 40 b: test a quarter = 10 + 10, then of 60 a sixth for validation = 5 + 5."""
    examples = labelled(("train", "f", "t", ["a", "b"] * 40))
    (splits,) = assign(examples, "iid", 1, test_fraction=0.25, validation_fraction=1 / 6).values()
    assert histogram(examples, splits["test"]) == {"a": 10, "b": 10}
    assert histogram(examples, splits["validation"]) == {"a": 5, "b": 5}
    assert histogram(examples, splits["train"]) == {"a": 25, "b": 25}


def test_holdout_splits_are_stratified_by_task_too(labelled: Labelled) -> None:
    examples = labelled(*[("train", task, task, ["a", "b"] * 20) for task in "xyz"])
    (splits,) = assign(examples, "mixed_task", 1, test_fraction=0.2, validation_fraction=0).values()
    found = Counter(zip(examples.field("task")[splits["test"]], examples.field("label")[splits["test"]], strict=True))
    assert found == {(task, label): 4 for task in "xyz" for label in "ab"}


def test_needed_is_the_smallest_size_that_leaves_enough() -> None:
    """0.25 and 0.15 of 7: test 2 (1.75 rounded), then validation 1 (0.75): 4 remain; of 6: 2 (1.5), 1, 3 remain."""
    none = np.array([], dtype=np.int64)
    some = np.array([0])
    config = Iid(min_examples=4)
    assert needed(config, {"train": some, "validation": none, "test": none}) == 7
    assert needed(config, {"train": some, "validation": some, "test": some}) == 4
