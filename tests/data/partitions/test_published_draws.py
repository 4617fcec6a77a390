"""Partitions as published code draws them: Dirichlet with a cap and redraws, and official splits by draws of their own.

`published` is the procedure of FedHFT's code (and FedML's before it) and of FederatedScope's, on lists of row numbers.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from partitioning import abc, assign, histogram, rows_of

from fedray.data.examples import Examples
from fedray.data.official import divided
from fedray.data.partitions.dirichlet import counts_by_class
from fedray.errors import DataError
from fedray.randomness import keyed_rng

Labelled = Callable[..., Examples]
ALL = {"validation_fraction": 0, "test_fraction": 0, "min_examples": 1}


def published(labels: np.ndarray, clients: int, alpha: float, cap: bool, fewest: int, seed: int) -> list[list[int]]:
    """Return how many rows of every class each client gets: class by class, a draw is cut at whole numbers of rows."""
    rng = keyed_rng(seed, "partition", "dirichlet", 0)
    smallest = -1
    while smallest < fewest:
        held: list[list[int]] = [[] for _ in range(clients)]
        for name in np.unique(labels):
            rows = np.flatnonzero(labels == name)
            share = rng.dirichlet(np.repeat(alpha, clients))
            if cap:
                share = np.array([p * (len(own) < len(labels) / clients) for p, own in zip(share, held, strict=True)])
                share = share / share.sum()
            cuts = (np.cumsum(share) * len(rows)).astype(int)[:-1]
            held = [own + part.tolist() for own, part in zip(held, np.split(rows, cuts), strict=True)]
        smallest = min(len(own) for own in held)
    return [[int((labels[own] == name).sum()) for name in np.unique(labels)] for own in held]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    clients=st.integers(2, 8),
    alpha=st.sampled_from([0.3, 0.5, 10 / 3]),
    cap=st.booleans(),
    fewest=st.sampled_from([1, "classes", 9]),
    seed=st.integers(0, 5),
)
def test_the_draws_are_those_of_published_code(
    labelled: Labelled, clients: int, alpha: float, cap: bool, fewest: Any, seed: int
) -> None:
    labels = abc(40) + ["a"] * 50 + ["c"] * 17
    examples = labelled(("train", "f", "t", labels))
    found = assign(examples, "dirichlet", clients, seed, alpha=alpha, cap=cap, fewest=fewest, **ALL)
    counts = [[histogram(examples, splits["train"])[name] for name in "abc"] for splits in found.values()]
    assert counts == published(np.array(labels), clients, alpha, cap, 3 if fewest == "classes" else fewest, seed)
    assert rows_of(found) == list(range(len(labels)))


def test_a_client_with_its_even_share_gets_nothing_of_later_classes() -> None:
    """3 clients and 12 rows: 4 each. Of six a's, .9 .1 0 gives 5 and 1 (cuts at 5.4 and 6); client 0 is full. Of six
    b's, 0 .5 .5 after normalisation gives 3 and 3 (cuts at 0 and 3), and without a cap .5 .25 .25 gives 3, 1, 2."""
    sizes, shares = np.array([6, 6]), np.array([[0.9, 0.5], [0.1, 0.25], [0.0, 0.25]])
    assert counts_by_class(sizes, shares, cap=True).tolist() == [[5, 0], [1, 3], [0, 3]]
    assert counts_by_class(sizes, shares, cap=False).tolist() == [[5, 3], [1, 1], [0, 2]]


def test_where_all_that_may_have_a_class_drew_nothing_of_it_they_share_it() -> None:
    """Client 0 has all four a's, more than its even share of 8 / 3; the others' shares of b are zero."""
    sizes, shares = np.array([4, 4]), np.array([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    assert counts_by_class(sizes, shares, cap=True).tolist() == [[4, 0], [0, 2], [0, 2]]


def test_the_cap_evens_sizes_out(labelled: Labelled) -> None:
    examples = labelled(("train", "f", "t", [f"{i % 20:02d}" for i in range(2000)]))

    def largest(cap: bool) -> int:
        found = assign(examples, "dirichlet", 10, alpha=0.1, cap=cap, **ALL)
        return max(len(splits["train"]) for splits in found.values())

    assert largest(cap=True) < 300 < largest(cap=False)  # an even share is 200, and the class that exceeds it has 100


def test_a_minimum_that_no_draw_reaches_is_refused(labelled: Labelled) -> None:
    examples = labelled(("train", "f", "t", abc(10)))
    with pytest.raises(DataError, match=r"partition\.fewest: none of 1000 draws gives each of 5 clients 7 of 30"):
        assign(examples, "dirichlet", 5, fewest=7, **ALL)


def skewed(labelled: Labelled, source_splits: str, seed: int = 0, **changes: Any) -> tuple[Examples, Any]:
    parts = [(split, "f", "t", abc(n)) for split, n in (("train", 200), ("validation", 50), ("test", 100))]
    examples = labelled(*parts)
    options = {"alpha": 0.3, "source_splits": source_splits} | changes
    return examples, assign(examples, "dirichlet", 4, seed, **options)


def distance(examples: Examples, splits: Any, one: str, other: str) -> float:
    """Return the total variation distance of two splits' label distributions."""
    found = [[histogram(examples, splits[name])[label] / len(splits[name]) for label in "abc"] for name in (one, other)]
    return float(np.abs(np.subtract(*found)).sum() / 2)


def test_splits_of_the_source_share_the_skew_or_have_one_of_their_own(labelled: Labelled) -> None:
    """Alike: equal up to rounding. Pooled: a client's rows at random, so equal up to chance. Independent: as far apart
    as two draws are."""
    found: dict[str, list[float]] = {}
    for way in ("alike", "pooled", "independent"):
        for seed in range(3):
            examples, result = skewed(labelled, way, seed)
            assert rows_of(result) == list(range(len(examples)))
            found.setdefault(way, [])
            for splits in result.values():
                found[way] += [distance(examples, splits, "train", other) for other in ("validation", "test")]
    assert np.mean(found["alike"]) < np.mean(found["pooled"]) < 0.1 < 0.3 < np.mean(found["independent"])
    assert max(found["independent"]) > 0.6


def test_an_independent_draw_leaves_training_as_it_is(labelled: Labelled) -> None:
    same, other = (skewed(labelled, way)[1] for way in ("alike", "independent"))
    assert all(np.array_equal(same[client]["train"], other[client]["train"]) for client in same)
    assert not all(np.array_equal(same[client]["test"], other[client]["test"]) for client in same)


def test_independent_splits_are_draws_of_the_same_kind(labelled: Labelled) -> None:
    """Validation and test are published draws themselves, of their own rows and keys."""
    examples, result = skewed(labelled, "independent", fewest=1, min_examples=1)
    for split, rows in (("validation", 50), ("test", 100)):
        rng = keyed_rng(0, "partition", "dirichlet", split)
        expected = counts_by_class(np.full(3, rows), rng.dirichlet([0.3] * 4, size=3).T, cap=False)
        found = [[histogram(examples, splits[split])[name] for name in "abc"] for splits in result.values()]
        assert found == expected.tolist()


@pytest.mark.parametrize("kind", ["iid", "quantity_skew", "shards", "mixed_task", "distinct_task"])
def test_every_kind_that_draws_shares_can_pool_them(labelled: Labelled, kind: str) -> None:
    parts = [
        (split, "f", task, abc(n)) for task in "tu" for split, n in (("train", 40), ("validation", 5), ("test", 9))
    ]
    examples = labelled(*parts)
    found = assign(examples, kind, 4, source_splits="pooled")
    assert rows_of(found) == list(range(len(examples)))
    split = examples.field("split")
    for splits in found.values():
        assert all(set(split[rows]) == {name} for name, rows in splits.items())
        assert len(splits["train"]) >= 4


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    counts=st.lists(st.tuples(*[st.integers(0, 30)] * 3), min_size=2, max_size=6).map(np.array),
    share=st.floats(0.05, 0.4),
    seed=st.integers(0, 9),
)
def test_a_pool_is_divided_without_rest(counts: np.ndarray, share: float, seed: int) -> None:
    """Every split gets its number of each class, and the splits of a client add up to its examples, unless a client
    with too few training examples got some of another's."""
    counts = counts + 4
    sizes = {"validation": np.floor(share * counts.sum(axis=0)).astype(int), "test": counts.sum(axis=0) // 5}
    sizes["train"] = counts.sum(axis=0) - sizes["validation"] - sizes["test"]
    found = divided(counts, sizes, 4, np.random.default_rng(seed))  # type: ignore[arg-type]
    for split, of_split in found.items():
        assert of_split.min() >= 0
        assert of_split.sum(axis=0).tolist() == sizes[split].tolist()
    least = 4 if sizes["train"].sum() >= 4 * len(counts) else 0
    assert found["train"].sum(axis=1).min() >= least
    if found["train"].sum(axis=1).min() > 4:
        assert sum(found.values()).tolist() == counts.tolist()  # type: ignore[attr-defined]


def test_a_pool_is_divided_as_if_its_rows_were_shuffled() -> None:
    """Two clients with 30 and 10 of 40 examples, 20 of which are test: the first has 15 on average, with the variance
    20 · 3/4 · 1/4 · 20/39 = 1.923 of a draw without replacement."""
    counts, sizes = (
        np.array([[30], [10]]),
        {"train": np.array([20]), "validation": np.array([0]), "test": np.array([20])},
    )
    draws = [divided(counts, sizes, 1, np.random.default_rng(seed))["test"][0, 0] for seed in range(2000)]  # type: ignore[arg-type]
    assert abs(np.mean(draws) - 15) < 0.15
    assert abs(np.var(draws) - 1.923) < 0.25


@pytest.mark.parametrize(
    ("kind", "source_splits", "official", "message"),
    [
        (
            "dirichlet",
            "pooled",
            False,
            "partition.source_splits: 'pooled' is about the source's own validation and test",
        ),
        ("by_file", "independent", True, "`by_file` are those that the data names"),
        ("distinct_task", "independent", True, "draws other clients for test than for training"),
    ],
)
def test_draws_that_make_no_sense_are_refused(
    labelled: Labelled, kind: str, source_splits: str, official: bool, message: str
) -> None:
    parts = [(split, "f", task, abc(20)) for task in "tu" for split in ("train", "test")[: 1 + official]]
    with pytest.raises(DataError, match=message):
        assign(labelled(*parts), kind, None if kind != "dirichlet" else 2, source_splits=source_splits)


def test_a_client_without_validation_examples_gets_one_of_its_own_for_one(labelled: Labelled) -> None:
    """Few validation rows for many clients, as in GLUE's WNLI over 50 clients: nobody is left without."""
    examples = labelled(("train", "f", "t", ["a", "b"] * 150), ("validation", "f", "t", ["a", "b"] * 20))
    options = {"alpha": 5.0, "cap": True, "fewest": "classes", "min_examples": 2, "test_fraction": 0}
    found = assign(examples, "dirichlet", 30, source_splits="pooled", **options)
    assert min(len(splits["validation"]) for splits in found.values()) >= 1
    assert rows_of(found) == list(range(340))
