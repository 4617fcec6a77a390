"""Partitions: what holds for every kind, and what each kind is for."""

from collections import Counter
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedray.config import PartitionConfig
from fedray.data.deal import apportion, holders, repair
from fedray.data.examples import Examples
from fedray.data.holdout import needed
from fedray.data.partition import Partition, partition
from fedray.data.plans import safe_names
from fedray.errors import DataError
from fedray.types import SPLITS

Labelled = Callable[..., Examples]
DEALT = ("iid", "dirichlet", "shards", "quantity_skew", "mixed_task")


def deal(examples: Examples, kind: str, clients: int | None, seed: int = 0, **settings_: Any) -> Partition:
    return partition(examples, PartitionConfig.model_validate({"kind": kind} | settings_), clients, seed)


def abc(count: int) -> list[str]:
    """Labels a, b, c in turn."""
    return list("abc" * count)


def rows_of(result: Partition) -> list[int]:
    return sorted(int(row) for splits in result.values() for rows in splits.values() for row in rows)


def histogram(examples: Examples, rows: np.ndarray) -> Counter[str]:
    return Counter(examples.field("label")[rows].tolist())


# What holds for every kind.


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(DEALT),
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
    blocks = [("train", f"f{i}", f"task {i}", abc(train // 3)[i::2]) for i in range(2)]
    # Fewer official examples than this per client and class cannot reach every client in all kinds.
    blocks += [
        (split, "f0", "task 0", abc(size)) for split, size in (("validation", validation), ("test", test)) if size >= 7
    ]
    examples = labelled(*blocks)
    shards = {"classes_per_client": 3 if clients == 1 else 2}
    result = deal(examples, kind, clients, seed, alpha=alpha, min_examples=least, **shards)
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


@pytest.mark.parametrize("kind", [*DEALT, "distinct_task", "by_file", "by_column"])
def test_the_seed_and_the_content_decide_not_the_order_of_rows(labelled: Labelled, kind: str) -> None:
    examples = labelled(("train", "x", "t", abc(15)), ("train", "y", "u", abc(20)))
    config = {"column": "label"} if kind == "by_column" else {}
    shuffle = np.random.default_rng(5).permutation(len(examples))
    shuffled = examples.take(shuffle)

    def contents(of: Examples, seed: int) -> list[list[str]]:
        result = deal(of, kind, 2, seed, **config)
        return [of.field("text")[rows].tolist() for splits in result.values() for rows in splits.values()]

    assert contents(examples, 1) == contents(shuffled, 1)
    assert contents(examples, 1) != contents(examples, 2)


# Kinds.


def test_iid_sizes_differ_by_at_most_one(labelled: Labelled) -> None:
    result = deal(labelled(("train", "f", "t", abc(34))), "iid", 4, validation_fraction=0, test_fraction=0)
    assert sorted(len(splits["train"]) for splits in result.values()) == [25, 25, 26, 26]
    assert all(len(splits["test"]) == 0 for splits in result.values())


def test_small_alpha_is_more_skewed_than_large(labelled: Labelled) -> None:
    """Mean entropy of the clients' label distributions; even thirds have log 3 = 1.0986."""
    examples = labelled(("train", "f", "t", abc(300)))

    def entropy(alpha: float) -> float:
        values = []
        for splits in deal(examples, "dirichlet", 6, 3, alpha=alpha).values():
            share = np.array(list(histogram(examples, splits["train"]).values())) / len(splits["train"])
            values.append(-(share * np.log(share)).sum())
        return float(np.mean(values))

    assert entropy(0.05) < 0.6 < 0.9 < entropy(1.0) + 0.2
    assert entropy(1.0) < entropy(1000.0)
    assert entropy(1000.0) > 1.09


def test_quantity_skew_changes_sizes_not_labels(labelled: Labelled) -> None:
    examples = labelled(("train", "f", "t", abc(1000)))
    sizes = [len(s["train"]) for s in deal(examples, "quantity_skew", 5, alpha=0.3).values()]
    even = [len(s["train"]) for s in deal(examples, "quantity_skew", 5, alpha=1e6).values()]
    assert max(sizes) > 4 * min(sizes)
    assert max(even) <= 1.02 * min(even)
    largest = max(deal(examples, "quantity_skew", 5, alpha=0.3).values(), key=lambda s: len(s["train"]))
    counts = histogram(examples, largest["train"])
    assert max(counts.values()) < 1.3 * min(counts.values())


def test_shards_give_every_client_its_number_of_classes_and_every_class_a_client(labelled: Labelled) -> None:
    examples = labelled(("train", "f", "t", list("abcdefg") * 30), ("test", "f", "t", list("abcdefg") * 10))
    result = deal(examples, "shards", 6, classes_per_client=2)
    held = [set(histogram(examples, splits["train"])) for splits in result.values()]
    assert all(len(classes) == 2 for classes in held)
    assert set.union(*held) == set("abcdefg")
    for classes, splits in zip(held, result.values(), strict=True):
        assert set(histogram(examples, splits["test"])) == classes


def test_holders_prefer_classes_with_most_examples_per_holder() -> None:
    """10, 10 and 100 examples, 4 clients with 1 class: each class needs one, the fourth goes to the largest."""
    shares = holders(np.array([10, 10, 100]), 4, 1, np.random.default_rng(0))
    assert (shares > 0).sum(axis=0).tolist() == [1, 1, 2]
    assert shares.sum(axis=0).tolist() == [1, 1, 1]


def test_distinct_task_gives_client_k_task_k_mod_t(labelled: Labelled) -> None:
    blocks = [("train", name, name, abc(20)) for name in ("beta", "alpha", "gamma")]
    blocks += [("test", name, name, abc(4)) for name in ("gamma", "alpha", "beta")]
    examples = labelled(*blocks)
    tasks = examples.field("task")
    for clients, names in ((None, ["alpha", "beta", "gamma"]), (5, ["alpha", "alpha_2", "beta", "beta_2", "gamma"])):
        result = deal(examples, "distinct_task", clients)
        assert list(result) == names
        for name, splits in result.items():
            assert {name.removesuffix("_2")} == set(tasks[splits["train"]]) == set(tasks[splits["test"]])
        assert rows_of(result) == list(range(len(examples)))
    two = deal(examples, "distinct_task", 2)
    assert set(tasks[rows_of(two)]) == {"alpha", "beta"}


def test_mixed_task_gives_every_client_its_own_mixture(labelled: Labelled) -> None:
    examples = labelled(*[("train", name, name, abc(100)) for name in ("x", "y", "z")])

    def largest_share(alpha: float) -> list[float]:
        result = deal(examples, "mixed_task", 4, alpha=alpha)
        shares = []
        for splits in result.values():
            counts = Counter(examples.field("task")[splits["train"]].tolist())
            shares.append(max(counts.values()) / sum(counts.values()))
        return shares

    assert max(largest_share(0.1)) > 0.75
    assert max(largest_share(1e6)) < 0.36


def test_natural_clients_are_the_largest_with_safe_names(labelled: Labelled) -> None:
    examples = labelled(*[("train", f"Speaker {n}/x", "t", abc(n)) for n in (4, 9, 7, 3)])
    result = deal(examples, "by_file", 2)
    assert list(result) == ["Speaker_7_x", "Speaker_9_x"]
    assert {name: sum(map(len, splits.values())) for name, splits in result.items()} == {
        "Speaker_7_x": 21,
        "Speaker_9_x": 27,
    }
    by_label = deal(examples, "by_column", None, column="label")
    assert [set(histogram(examples, splits["train"])) for splits in by_label.values()] == [{"a"}, {"b"}, {"c"}]


def test_names_stay_unique_also_where_case_does_not_count() -> None:
    assert safe_names(["a b", "a_b", "A-b", "a?b", "", "../é"]) == [
        "a_b",
        "a_b_2",
        "A-b",
        "a_b_3",
        "unnamed",
        "unnamed_2",
    ]
    assert safe_names(["ALL", "All"]) == ["ALL", "All_2"]


def test_a_common_test_file_is_dealt_by_the_clients_sizes(labelled: Labelled) -> None:
    """Train sizes 60 and 30: of 12 common test examples they get 8 and 4."""
    examples = labelled(("train", "x", "t", abc(20)), ("train", "y", "t", abc(10)), ("test", "common", "t", abc(4)))
    result = deal(examples, "by_file", None)
    assert {name: len(splits["test"]) for name, splits in result.items()} == {"x": 8, "y": 4}


# Official splits, carving, minima.


@pytest.mark.parametrize("kind", ["dirichlet", "mixed_task"])
def test_official_splits_follow_the_training_distribution(labelled: Labelled, kind: str) -> None:
    """Half as many test as train examples: each client has half as many of each class, up to rounding and repair."""
    blocks = [(split, "f", task, [task] * n) for split, n in (("train", 200), ("test", 100)) for task in "abc"]
    examples = labelled(*blocks)
    result = deal(examples, kind, 5, 2, alpha=0.3, validation_fraction=0)
    for splits in result.values():
        train, test = (histogram(examples, splits[name]) for name in ("train", "test"))
        assert all(abs(test[label] - train[label] / 2) <= 2 for label in "abc")


def test_official_examples_of_an_unseen_class_are_dealt_too(labelled: Labelled) -> None:
    examples = labelled(("train", "f", "t", abc(20)), ("test", "f", "t", [*abc(3), "new", "new"]))
    result = deal(examples, "dirichlet", 3)
    assert rows_of(result) == list(range(len(examples)))


def test_carving_is_stratified_by_class(labelled: Labelled) -> None:
    """40 a, 40 b: test a quarter = 10 + 10, then of 60 a sixth for validation = 5 + 5."""
    examples = labelled(("train", "f", "t", ["a", "b"] * 40))
    (splits,) = deal(examples, "iid", 1, test_fraction=0.25, validation_fraction=1 / 6).values()
    assert histogram(examples, splits["test"]) == {"a": 10, "b": 10}
    assert histogram(examples, splits["validation"]) == {"a": 5, "b": 5}
    assert histogram(examples, splits["train"]) == {"a": 25, "b": 25}


def test_carving_is_stratified_by_task_too(labelled: Labelled) -> None:
    examples = labelled(*[("train", task, task, ["a", "b"] * 20) for task in "xyz"])
    (splits,) = deal(examples, "mixed_task", 1, test_fraction=0.2, validation_fraction=0).values()
    found = Counter(zip(examples.field("task")[splits["test"]], examples.field("label")[splits["test"]], strict=True))
    assert found == {(task, label): 4 for task in "xyz" for label in "ab"}


def test_needed_is_the_smallest_size_that_leaves_enough() -> None:
    """0.25 and 0.15 of 7: test 2 (1.75 rounded), then validation 1 (0.75): 4 remain; of 6: 2 (1.5), 1, 3 remain."""
    none = np.array([], dtype=np.int64)
    some = np.array([0])
    config = PartitionConfig(min_examples=4)
    assert needed(config, {"train": some, "validation": none, "test": none}) == 7
    assert needed(config, {"train": some, "validation": some, "test": some}) == 4


def test_repair_takes_from_the_largest_what_the_poor_has_a_share_in() -> None:
    counts = np.array([[6, 4], [3, 2], [0, 0]])
    shares = np.array([[0.6, 0.6], [0.4, 0.3], [0.0, 0.1]])
    repaired = repair(counts, 2, shares, np.ones((3, 2), dtype=bool))
    assert repaired.tolist() == [[6, 2], [3, 2], [0, 2]]
    only_first = np.array([[True, True], [True, True], [True, False]])
    assert repair(counts, 2, shares, only_first).tolist() == [[4, 4], [3, 2], [2, 0]]
    impossible = repair(np.array([[2, 0], [0, 1]]), 2, np.ones((2, 2)), np.ones((2, 2), dtype=bool))
    assert impossible.tolist() == [[2, 0], [0, 1]]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.integers(0, 50), st.integers(0, 9))
def test_apportioned_counts_are_neighbours_of_the_exact_ones(weights: list[float], size: int, seed: int) -> None:
    share = np.array(weights) + 1e-3
    share = (share / share.sum())[:, None]
    counts = apportion(share, np.array([size]), np.random.default_rng(seed))
    assert counts.sum() == size
    assert (np.abs(counts - share * size) < 1 + 1e-9).all()
    assert (counts >= 0).all()


def test_dirichlet_reaches_its_minimum_by_repair_and_says_when_it_cannot(labelled: Labelled) -> None:
    """10 clients, alpha 0.001: every class goes to one client, so seven have nothing before the repair."""
    examples = labelled(("train", "f", "t", abc(25)))
    result = deal(examples, "dirichlet", 10, alpha=0.001, min_examples=4)
    assert min(len(splits["train"]) for splits in result.values()) == 4
    with pytest.raises(DataError, match=r"needs 7 examples.*4 remain.*of 75 for 11 clients.*clients\.count"):
        deal(examples, "dirichlet", 11, alpha=0.001, min_examples=4)


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
        deal(examples, kind, clients, **settings_)


def test_a_client_without_official_test_examples_is_refused_by_name(labelled: Labelled) -> None:
    examples = labelled(("train", "x", "t", abc(9)), ("train", "y", "t", abc(9)), ("test", "x", "t", abc(2)))
    with pytest.raises(DataError, match=r"1 of 2 clients get none of the 6 test examples: y;"):
        deal(examples, "by_file", None)
    few = labelled(("train", "x", "t", abc(30)), ("test", "x", "t", ["a", "b"]))
    with pytest.raises(DataError, match="none of the 2 test examples"):
        deal(few, "dirichlet", 3)


def test_no_row_twice_among_natural_clients_that_are_left_out(labelled: Labelled) -> None:
    examples = labelled(*[(split, f, "t", abc(9)) for f in "xyz" for split in ("train", "test")])
    result = deal(examples, "by_file", 2)
    rows = rows_of(result)
    assert len(rows) == len(set(rows)) == 2 * 54
    assert set(chain.from_iterable(examples.field("file")[r] for s in result.values() for r in s.values())) == {
        "x",
        "y",
    }
