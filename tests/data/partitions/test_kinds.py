"""Built-in partitioners: what each kind is for."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pytest
from partitioning import abc, assign, histogram, rows_of

from fedray.config import RawRows
from fedray.data.examples import Examples, assemble
from fedray.data.partitions.shards import holders
from fedray.data.sources.files import Files
from fedray.errors import DataError
from fedray.types import Split

Labelled = Callable[..., Examples]


def test_iid_sizes_differ_by_at_most_one(labelled: Labelled) -> None:
    result = assign(labelled(("train", "f", "t", abc(34))), "iid", 4, validation_fraction=0, test_fraction=0)
    assert sorted(len(splits["train"]) for splits in result.values()) == [25, 25, 26, 26]
    assert all(len(splits["test"]) == 0 for splits in result.values())


def test_small_alpha_is_more_skewed_than_large(labelled: Labelled) -> None:
    """Mean entropy of the clients' label distributions; even thirds have log 3 = 1.0986."""
    examples = labelled(("train", "f", "t", abc(300)))

    def entropy(alpha: float) -> float:
        values = []
        for splits in assign(examples, "dirichlet", 6, 3, alpha=alpha).values():
            share = np.array(list(histogram(examples, splits["train"]).values())) / len(splits["train"])
            values.append(-(share * np.log(share)).sum())
        return float(np.mean(values))

    assert entropy(0.05) < 0.6 < 0.9 < entropy(1.0) + 0.2
    assert entropy(1.0) < entropy(1000.0)
    assert entropy(1000.0) > 1.09


def test_quantity_skew_changes_sizes_not_labels(labelled: Labelled) -> None:
    examples = labelled(("train", "f", "t", abc(1000)))
    sizes = [len(s["train"]) for s in assign(examples, "quantity_skew", 5, alpha=0.3).values()]
    even = [len(s["train"]) for s in assign(examples, "quantity_skew", 5, alpha=1e6).values()]
    assert max(sizes) > 4 * min(sizes)
    assert max(even) <= 1.02 * min(even)
    largest = max(assign(examples, "quantity_skew", 5, alpha=0.3).values(), key=lambda s: len(s["train"]))
    counts = histogram(examples, largest["train"])
    assert max(counts.values()) < 1.3 * min(counts.values())


def test_shards_give_every_client_its_number_of_classes_and_every_class_a_client(labelled: Labelled) -> None:
    examples = labelled(("train", "f", "t", list("abcdefg") * 30), ("test", "f", "t", list("abcdefg") * 10))
    result = assign(examples, "shards", 6, classes_per_client=2)
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
    parts = [("train", name, name, abc(20)) for name in ("beta", "alpha", "gamma")]
    parts += [("test", name, name, abc(4)) for name in ("gamma", "alpha", "beta")]
    examples = labelled(*parts)
    tasks = examples.field("task")
    for clients, names in ((None, ["alpha", "beta", "gamma"]), (5, ["alpha", "alpha_2", "beta", "beta_2", "gamma"])):
        result = assign(examples, "distinct_task", clients)
        assert list(result) == names
        for name, splits in result.items():
            assert {name.removesuffix("_2")} == set(tasks[splits["train"]]) == set(tasks[splits["test"]])
        assert rows_of(result) == list(range(len(examples)))
    two = assign(examples, "distinct_task", 2)
    assert set(tasks[rows_of(two)]) == {"alpha", "beta"}


def test_mixed_task_gives_every_client_its_own_mixture(labelled: Labelled) -> None:
    examples = labelled(*[("train", name, name, abc(100)) for name in ("x", "y", "z")])

    def largest_share(alpha: float) -> list[float]:
        result = assign(examples, "mixed_task", 4, alpha=alpha)
        shares = []
        for splits in result.values():
            counts = Counter(examples.field("task")[splits["train"]].tolist())
            shares.append(max(counts.values()) / sum(counts.values()))
        return shares

    assert max(largest_share(0.1)) > 0.75
    assert max(largest_share(1e6)) < 0.36


def test_natural_clients_are_the_largest_with_their_own_names(labelled: Labelled) -> None:
    examples = labelled(*[("train", f"Speaker {n}/x", "t", abc(n)) for n in (4, 9, 7, 3)])
    result = assign(examples, "by_file", 2)
    assert list(result) == ["Speaker 7/x", "Speaker 9/x"]
    assert {name: sum(map(len, splits.values())) for name, splits in result.items()} == {
        "Speaker 7/x": 21,
        "Speaker 9/x": 27,
    }
    by_label = assign(examples, "by_column", None, column="label")
    assert [set(histogram(examples, splits["train"])) for splits in by_label.values()] == [{"a"}, {"b"}, {"c"}]


def spoken(*splits: tuple[Split, Sequence[Any]]) -> Examples:
    """Return examples with a column of speakers, one per example; a split without any lacks the column."""
    parts = []
    for split, who in splits:
        columns: dict[str, Any] = {
            "text": [f"{split} {i}" for i in range(len(who))],
            "label": abc(len(who))[: len(who)],
        }
        parts.append(RawRows(f"{split}.jsonl", columns | ({"who": who} if any(who) else {}), split, unit="line"))
    return assemble(parts, Files(files={"train": "-"}), "classification")


@pytest.mark.parametrize("nothing", [None, math.nan, "", "  "], ids=repr)
def test_an_example_without_a_client_is_refused_with_its_row(nothing: Any) -> None:
    examples = spoken(("train", [*["Ann", "Bob"] * 20, nothing, "Ann", nothing]))
    message = r"train\.jsonl: line 41: no client \(column 'who': nothing\); 2 of 43 train examples have none"
    with pytest.raises(DataError, match=message):
        assign(examples, "by_column", None, column="who")
    some = spoken(("train", ["Ann", "Bob"] * 20), ("test", ["Ann", "Bob", nothing, "Ann"]))
    with pytest.raises(DataError, match=r"test\.jsonl: line 3: no client .* 1 of 4 test examples"):
        assign(some, "by_column", None, column="who")


def test_a_split_in_which_no_example_has_a_client_is_common_to_all() -> None:
    examples = spoken(("train", ["Ann", "Bob"] * 20), ("test", [None] * 10))
    result = assign(examples, "by_column", None, column="who")
    assert {name: len(splits["test"]) for name, splits in result.items()} == {"Ann": 5, "Bob": 5}


def test_no_row_twice_among_natural_clients_that_are_left_out(labelled: Labelled) -> None:
    examples = labelled(*[(split, f, "t", abc(9)) for f in "xyz" for split in ("train", "test")])
    result = assign(examples, "by_file", 2)
    rows = rows_of(result)
    assert len(rows) == len(set(rows)) == 2 * 54
    assert set(chain.from_iterable(examples.field("file")[r] for s in result.values() for r in s.values())) == {
        "x",
        "y",
    }
