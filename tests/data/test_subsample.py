"""Limits on the number of examples."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from fedray.config import RawRows
from fedray.data.examples import Examples, assemble
from fedray.data.sources.files import Files
from fedray.data.subsample import subsample
from fedray.errors import DataError


def test_limits_keep_what_they_say_by_seed_and_not_by_order(labelled: Callable[..., Examples]) -> None:
    examples = labelled(("train", "f", "t", list("aaaabbbbbc")), ("test", "f", "t", list("abcabc")))

    def kept(of: Examples, seed: int, **limits: int) -> Examples:
        return subsample(of, Files(files={"train": "-"}, **limits), seed)

    per_class = kept(examples, 0, max_per_class=3)
    train = per_class.field("split") == "train"
    assert Counter(per_class.field("label")[train]) == {"a": 3, "b": 3, "c": 1}
    both = kept(examples, 0, max_per_class=3, max_examples=5, max_test_examples=2)
    assert Counter(both.field("split")) == {"train": 5, "test": 2}
    assert both.label_names == ("a", "b", "c")
    shuffled = examples.take(np.random.default_rng(0).permutation(len(examples)))
    assert set(kept(shuffled, 0, max_examples=4).field("text")) == set(kept(examples, 0, max_examples=4).field("text"))
    assert set(kept(examples, 1, max_examples=4).field("text")) != set(kept(examples, 0, max_examples=4).field("text"))


def test_max_per_class_needs_classes() -> None:
    config = Files(files={"train": "-"}, max_per_class=3)
    examples = assemble([RawRows("here", {"prompt": ["p"], "answer": ["a"]})], config, "causal_lm")
    with pytest.raises(DataError, match="max_per_class: there are no classes"):
        subsample(examples, config, 0)
