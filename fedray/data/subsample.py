"""Keeping fewer examples: a keyed draw that depends on the examples' content, not on their order."""

import numpy as np

from fedray.config import DataConfig
from fedray.config.partition import IntArray
from fedray.data.examples import Examples, rows_by_section
from fedray.errors import DataError, choices
from fedray.randomness import keyed_rng
from fedray.types import COMMON, ROLES


def subsample(examples: Examples, data: DataConfig, seed: int) -> Examples:
    """Return the examples that max_per_class, max_examples, max_validation_examples and max_test_examples leave, in
    their order: first those of every part of the data, then those of all parts together.

    Raises:
        DataError: max_per_class without classes.
    """
    # One shuffled order serves all limits: each keeps the first rows of it.
    shuffled = np.argsort(examples.digests, kind="stable")
    shuffled = shuffled[keyed_rng(seed, "subsample").permutation(len(examples))]
    sections = data.sections_by_path
    if any(section is not data for section in sections.values()):
        kept = np.zeros(len(examples), dtype=bool)
        for path, rows in rows_by_section(examples, data).items():
            own = shuffled[np.isin(shuffled, rows)]
            kept[_within_limits(own, examples, sections[path], path)] = True
        shuffled = shuffled[kept[shuffled]]
    return examples.take(np.sort(_within_limits(shuffled, examples, data, "data")))


def _within_limits(shuffled: IntArray, examples: Examples, data: DataConfig, path: str) -> IntArray:
    """Return the first of these rows, as many as the limits of a section leave.

    Args:
        path: where the section is, for messages.
    """
    splits = examples.field("split")[shuffled]
    rows = {role: shuffled[splits == role] for role in ROLES}
    if data.max_per_class is not None:
        rows["train"] = _first_of_each_class(rows["train"], examples, data, path)
    most = {
        "train": data.max_examples,
        "validation": data.max_validation_examples,
        "test": data.max_test_examples,
        COMMON: data.max_test_examples,
    }
    return np.concatenate([rows[role][: most[role]] for role in ROLES])


def _first_of_each_class(rows: IntArray, examples: Examples, data: DataConfig, path: str) -> IntArray:
    """Return, in their order, the first max_per_class of `rows` of every class."""
    names = examples.columns.column_names
    if examples.task == "regression" or (examples.task == "causal_lm" and data.label not in names):
        raise DataError(
            f"{path}.max_per_class: there are no classes (classification has them; causal_lm where the column "
            f"{path}.label {data.label!r} exists); columns: {choices(names)}"
        )
    classes = (examples.field("label") if examples.task == "classification" else examples.values(data.label))[rows]
    by_class = np.argsort(classes, kind="stable")
    ordered = classes[by_class]
    rank = np.arange(len(rows)) - np.searchsorted(ordered, ordered, side="left")
    return rows[np.sort(by_class[rank < (data.max_per_class or len(rows))])]
