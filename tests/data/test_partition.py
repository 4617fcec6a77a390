"""Partitions: what holds for every kind, official splits, and minima."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from partitioning import abc, assign, histogram, rows_of

from fedray.data.examples import Examples
from fedray.errors import DataError
from fedray.types import SPLITS

Labelled = Callable[..., Examples]


BY_SHARES = ("iid", "dirichlet", "shards", "quantity_skew", "mixed_task")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(BY_SHARES),
    clients=st.integers(1, 7),
    alpha=st.sampled_from([0.01, 0.3, 10.0]),
    sizes=st.tuples(st.integers(60, 90), st.integers(0, 30), st.integers(0, 30)),
    least=st.integers(1, 4),
    seed=st.integers(0, 3),
)
def test_every_example_goes_to_one_client_and_split_and_minima_hold(
    labelled: Labelled, kind: str, clients: int, alpha: float, sizes: tuple[int, int, int], least: int, seed: int
) -> None:
    train, validation, test = sizes
    parts = [("train", f"f{i}", f"task {i}", abc(train // 3)[i::2]) for i in range(2)]
    # Fewer official examples than this per client and class cannot reach every client in all kinds.
    parts += [
        (split, "f0", "task 0", abc(size)) for split, size in (("validation", validation), ("test", test)) if size >= 7
    ]
    examples = labelled(*parts)
    shards = {"classes_per_client": 3 if clients == 1 else 2}
    result = assign(examples, kind, clients, seed, alpha=alpha, min_examples=least, **shards)
    assert rows_of(result) == list(range(len(examples)))
    assert len(result) == clients
    assert list(result) == sorted(result)
    split = examples.field("split")
    for splits in result.values():
        assert len(splits["train"]) >= least
        assert len(splits["validation"]) >= 1
        assert len(splits["test"]) >= 1
        for name in SPLITS:
            official = (split == name).any()
            assert set(split[splits[name]]) == {name if official else "train"}


@pytest.mark.parametrize("kind", [*BY_SHARES, "distinct_task", "by_file", "by_column"])
def test_the_seed_and_the_content_decide_not_the_order_of_rows(labelled: Labelled, kind: str) -> None:
    examples = labelled(("train", "x", "t", abc(15)), ("train", "y", "u", abc(20)))
    config = {"column": "label"} if kind == "by_column" else {}
    shuffle = np.random.default_rng(5).permutation(len(examples))
    shuffled = examples.take(shuffle)

    def contents(of: Examples, seed: int) -> list[list[str]]:
        result = assign(of, kind, 2, seed, **config)
        return [of.field("text")[rows].tolist() for splits in result.values() for rows in splits.values()]

    assert contents(examples, 1) == contents(shuffled, 1)
    assert contents(examples, 1) != contents(examples, 2)


def test_a_common_test_file_is_assigned_by_the_clients_sizes(labelled: Labelled) -> None:
    """Train sizes 60 and 30: of 12 common test examples they get 8 and 4."""
    examples = labelled(("train", "x", "t", abc(20)), ("train", "y", "t", abc(10)), ("test", "common", "t", abc(4)))
    result = assign(examples, "by_file", None)
    assert {name: len(splits["test"]) for name, splits in result.items()} == {"x": 8, "y": 4}


@pytest.mark.parametrize("kind", ["dirichlet", "mixed_task"])
def test_official_splits_follow_the_training_distribution(labelled: Labelled, kind: str) -> None:
    """Half as many test as train examples: each client has half as many of each class, up to rounding and repair."""
    parts = [(split, "f", task, [task] * n) for split, n in (("train", 200), ("test", 100)) for task in "abc"]
    examples = labelled(*parts)
    result = assign(examples, kind, 5, 2, alpha=0.3, validation_fraction=0)
    for splits in result.values():
        train, test = (histogram(examples, splits[name]) for name in ("train", "test"))
        assert all(abs(test[label] - train[label] / 2) <= 2 for label in "abc")


def test_official_examples_of_an_unseen_stratum_are_assigned_too(labelled: Labelled) -> None:
    """In `iid`-like kinds a client may get examples of a stratum that no training example has."""
    examples = labelled(("train", "f", "t", abc(20)), ("test", "f", "t", abc(3)), ("test", "f", "new", abc(1)))
    result = assign(examples, "mixed_task", 3)
    assert rows_of(result) == list(range(len(examples)))


def test_dirichlet_reaches_its_minimum_by_repair_and_says_when_it_cannot(labelled: Labelled) -> None:
    """10 clients, alpha 0.001: every class goes to one client, so seven have nothing before the repair."""
    examples = labelled(("train", "f", "t", abc(25)))
    result = assign(examples, "dirichlet", 10, alpha=0.001, min_examples=4)
    assert min(len(splits["train"]) for splits in result.values()) == 4
    with pytest.raises(DataError, match=r"needs 7 examples.*4 remain.*of 75 for 11 clients.*clients\.count"):
        assign(examples, "dirichlet", 11, alpha=0.001, min_examples=4)


@pytest.mark.parametrize(
    ("kind", "clients", "settings_", "message"),
    [
        ("iid", None, {}, r"clients\.count: the partition `iid` needs"),
        ("shards", 2, {"classes_per_client": 4}, "only 3 classes"),
        ("shards", 2, {"classes_per_client": 1}, "at least 2, or raise clients.count"),
        ("by_column", None, {"column": "lable"}, "no column 'lable' .did you mean 'label'"),
        ("by_file", 3, {}, "set clients.count to at most 2"),
        ("by_file", None, {"min_examples": 8}, r"y \(9\); lower clients.count to at most 1"),
        ("distinct_task", 3, {"min_examples": 20}, "too few got"),
        ("dirichlet", 3, {"column": "colour"}, "no column 'colour'"),
    ],
)
def test_what_cannot_be_is_refused_with_the_setting_to_change(
    labelled: Labelled, kind: str, clients: int | None, settings_: dict[str, Any], message: str
) -> None:
    examples = labelled(("train", "x", "t", abc(20)), ("train", "y", "u", abc(3)))
    with pytest.raises(DataError, match=message):
        assign(examples, kind, clients, **settings_)


def test_a_client_without_official_test_examples_is_refused_by_name(labelled: Labelled) -> None:
    examples = labelled(("train", "x", "t", abc(9)), ("train", "y", "t", abc(9)), ("test", "x", "t", abc(2)))
    with pytest.raises(DataError, match=r"1 of 2 clients get none of the 6 test examples: y;"):
        assign(examples, "by_file", None)
    few = labelled(("train", "x", "t", abc(30)), ("test", "x", "t", ["a", "b"]))
    with pytest.raises(DataError, match="none of the 2 test examples"):
        assign(few, "dirichlet", 3)
