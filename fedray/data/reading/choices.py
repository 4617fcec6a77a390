"""The options of multiple-choice examples: which texts they are, and which one is right."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, compress
from typing import Any

import numpy as np
import pyarrow as pa

from fedray.config import DataConfig, RawRows
from fedray.config.data import MIN_CHOICES
from fedray.data.reading.templates import filled
from fedray.data.reading.values import as_text, column_of, shown, text_array
from fedray.errors import DataError, choices


@dataclass(frozen=True)
class _Options:
    """One row's options.

    Attributes:
        texts: without blanks around them; templates may give empty ones.
        labels: such as A, B, C; None where the data has none.
    """

    texts: Sequence[str]
    labels: Sequence[str] | None = None

    def labelled(self, labels: Sequence[str], place: str) -> "_Options":
        """Return the options with these labels, of which there may be more."""
        if len(self.texts) > len(labels):
            raise DataError(f"{place}: {len(labels)} for {len(self.texts)} options")
        return _Options(self.texts, labels[: len(self.texts)])

    def filled(self) -> "_Options":
        """Return the options that are not empty."""
        kept = [bool(text) for text in self.texts]
        return _Options(list(compress(self.texts, kept)), self.labels and list(compress(self.labels, kept)))


def with_choices(fields: Mapping[str, pa.Array], raw: RawRows, data: DataConfig, path: str) -> dict[str, pa.Array]:
    """Return the fields of these rows with `choices` (list<string>), the texts that may follow the prompt, and `right`
    (int32), the index of the one that does. If options have labels, `answer` becomes the text of the right one.

    Args:
        fields: with `prompt` and `answer`.
        data: the section with `choices`.
        path: where it is, for messages.

    Raises:
        DataError: the rows are conversations, a row has fewer than two options, or not exactly one that is right.
    """
    given, setting = data.choices, f"{path}.choices"
    if "turns" in fields:
        raise DataError(
            f"{raw.where}: {setting}: the data are conversations, which have no options; leave it out, or name "
            f"{path}.prompt and {path}.answer"
        )
    rows = _of_column(raw, given, setting) if isinstance(given, str) else _of_templates(raw, given or (), setting)
    if (labels := data.choice_labels) is not None:
        rows = [own.labelled(labels, f"{raw.row(row)}: {path}.choice_labels") for row, own in enumerate(rows)]
    answers, texts, right = [], [], []
    for row, (options, answer) in enumerate(zip(map(_Options.filled, rows), fields["answer"].to_pylist(), strict=True)):
        if len(options.texts) < MIN_CHOICES:
            raise DataError(f"{raw.row(row)}: {setting}: expected at least two options, got {list(options.texts)}")
        index = _right(options, answer.strip(), f"{raw.row(row)}: {setting}")
        before, _, after = answer.partition(answer.strip())
        whole = [f"{before}{text}{after}" for text in options.texts]
        answers.append(whole[index])
        texts.append(whole)
        right.append(index)
    owner = [row for row, own in enumerate(texts) for _ in own]
    flat = text_array(list(chain.from_iterable(texts)), lambda place: raw.row(owner[place]))
    return {
        **fields,
        "answer": text_array(answers, raw.row),
        "choices": pa.ListArray.from_arrays(np.searchsorted(owner, range(len(texts) + 1)).astype(np.int32), flat),
        "right": pa.array(right, pa.int32()),
    }


def _right(options: _Options, answer: str, place: str) -> int:
    """Return the index of the option that is the answer."""
    named = options.texts if options.labels is None else options.labels
    found = [index for index, name in enumerate(named) if name == answer]
    if len(found) != 1:
        what = "options" if options.labels is None else "labels of options"
        come = "none" if not found else f"{len(found)}"
        raise DataError(
            f"{place}: the answer {shown(answer)} must be one of the {what}, but equals {come} of: "
            f"{choices(repr(name[:80]) for name in named)}"
        )
    return found[0]


def _of_templates(raw: RawRows, templates: Sequence[str], setting: str) -> list[_Options]:
    """Return the options that templates give, some of them empty."""
    columns = [filled(raw, template, f"{setting}.{i}") for i, template in enumerate(templates)]
    return [_Options([text.strip() for text in row]) for row in zip(*columns, strict=True)]


def _of_column(raw: RawRows, column: str, setting: str) -> list[_Options]:
    return [_options(value, raw, row, column) for row, value in enumerate(column_of(raw, column, setting))]


def _options(value: Any, raw: RawRows, row: int, column: str) -> _Options:
    """Return the options in one value of a column: a list, or {text, label}, or the JSON text of either."""
    found = value
    if isinstance(value, str):
        try:
            found = json.loads(value)
        except ValueError:
            found = None
    labels = None
    if isinstance(found, Mapping) and {"text", "label"} <= set(found):
        labels, found = found["label"], found["text"]
    if not _is_list(found) or (labels is not None and (not _is_list(labels) or len(labels) != len(found))):
        raise DataError(
            f"{raw.at(row, column)}: expected a list of options, or {{text: [...], label: [...]}} of the same length, "
            f"got {shown(value)}"
        )
    texts = [as_text(text).strip() for text in found]
    if not all(texts):
        raise DataError(f"{raw.at(row, column)}: option {texts.index('') + 1} is empty")
    return _Options(texts, None if labels is None else [as_text(label).strip() for label in labels])


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
