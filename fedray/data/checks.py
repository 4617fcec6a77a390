"""What looks wrong in examples that are otherwise fine: notes for the user, a sentence each."""

from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fedray.config import DataConfig
from fedray.config.partition import IntArray
from fedray.data.examples import Examples, rows_by_section
from fedray.data.partition import Partition
from fedray.data.reading.templates import optional_columns
from fedray.errors import nearest
from fedray.types import COMMON, ROLES, SPLITS, Role

NEARLY_UNIQUE = 0.5
"""Classes per training example from which the labels look like texts or numbers of rows."""
FEWEST_CLASSES = 20
"""Fewer classes never look like that: small data sets have few examples per class."""
NEARLY_ALL = 0.95
"""Share of the most frequent label from which a score says little."""
SHOWN = 60
"""Characters of a text that a note shows."""
TARGETS = {
    "classification": ("label", "class"),
    "regression": ("label", "label"),
    "causal_lm": ("answer", "answer"),
}
"""By task: the column that is learned, and what a note calls it."""


def data_notes(
    source: Examples, kept: Examples, rows: Partition, common: IntArray, data: DataConfig
) -> tuple[str, ...]:
    """Return what a user should know about the examples before training.

    Args:
        source: all examples.
        kept: those that `data.max_examples` and its like leave.
        rows: of `kept`, by client and split.
        common: rows of `kept` that are the common test set.
        data: the section of the configuration.
    """
    by_role: dict[Role, IntArray] = {
        split: np.concatenate([splits[split] for splits in rows.values()]) for split in SPLITS
    }
    by_role[COMMON] = common
    return (
        *_missing_columns(source, data),
        *_unique_labels(source, data),
        *_constant_labels(kept.take(by_role["train"])),
        *_shared_texts(kept, by_role),
    )


def _missing_columns(examples: Examples, data: DataConfig) -> Iterator[str]:
    """Note optional fields of templates that no file has: the name may be misspelt."""
    if examples.task != "causal_lm":
        return
    for path, rows in rows_by_section(examples, data).items():
        section, names = data.sections_by_path[path], examples.column_names
        if len(rows) < len(examples):  # a part may lack columns that another has
            names = [name for name in names if any(examples.columns[name].take(rows).to_pylist())]
        templates = {f"{path}.prompt": section.prompt, f"{path}.answer": section.answer}
        if isinstance(section.choices, tuple):
            templates |= {f"{path}.choices.{i}": template for i, template in enumerate(section.choices)}
        for setting, template in templates.items():
            for column in dict.fromkeys(optional_columns(template, setting)):
                if column not in names and f"{column}?" not in names:
                    near = nearest(column, names)
                    yield f"{setting}: no file has the column {column!r}{near}, so its field is always empty"


def _unique_labels(examples: Examples, data: DataConfig) -> Iterator[str]:
    """Note labels that hardly occur twice: the column is probably another one."""
    if examples.task != "classification":
        return
    labels, training = examples.field("label"), examples.field("split") == "train"
    for path, rows in rows_by_section(examples, data).items():
        trained = labels[rows[training[rows]]]
        classes, size = len(np.unique(trained)), len(trained)
        if classes >= FEWEST_CLASSES and classes > NEARLY_UNIQUE * size:
            yield (
                f"{path}.label: the column {data.sections_by_path[path].label!r} has {classes:,} classes in {size:,} "
                "training examples; is it a column of texts or of numbers of rows, and not of classes?"
            )


def _constant_labels(train: Examples) -> Iterator[str]:
    """Note a label that nearly all training examples have."""
    column, what = TARGETS[train.task]
    counts = pc.value_counts(train.table[column])
    most = int(pc.max(counts.field("counts")).as_py())
    if most >= NEARLY_ALL * len(train):
        value = counts.field("values")[int(np.argmax(counts.field("counts")))].as_py()
        better = "; evaluation.metrics: [matthews] takes that into account" if train.task == "classification" else ""
        yield (
            f"{most:,} of {len(train):,} training examples have the same {what}, {_start(str(value))}: a model that "
            f"always gives it looks good{better}"
        )


def _shared_texts(examples: Examples, by_role: Mapping[Role, IntArray]) -> Iterator[str]:
    """Note evaluation examples whose content is trained on."""
    content = _content(examples)
    train = content.take(pa.array(by_role["train"]))
    for role in ROLES[1:]:
        texts = content.take(pa.array(by_role[role]))
        shared = texts.filter(pc.is_in(texts, value_set=train))
        if len(shared):
            what = "common test" if role == COMMON else role
            yield (
                f"{what} examples with the text of a training example: {len(shared):,} of {len(texts):,}, such as "
                f"{_start(shared[0].as_py())}; the {what} results are too good by what the model remembers of them"
            )


def _content(examples: Examples) -> pa.Array:
    """Return what the model reads of every example, and for causal_lm also what it must continue with; blanks and line
    breaks do not count."""
    names = ("turns",) if examples.conversations else ("prompt", "answer", "text", "text_pair")
    parts = [examples.table[name] for name in names if name in examples.table.column_names]
    joined = pc.binary_join_element_wise(*parts, " ")
    return pc.utf8_trim_whitespace(pc.replace_substring_regex(joined, r"\s+", " ")).combine_chunks()


def _start(text: str) -> str:
    """Return the quoted beginning of a text."""
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")
