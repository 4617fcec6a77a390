"""Notes about data that can be used as it is, but should be looked at."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedray.config import Config, RawRows
from fedray.data.checks import data_notes
from fedray.data.examples import assemble
from fedray.data.load import load_federated_data
from fedray.data.partition import partition
from fedray.data.subsample import subsample
from fedray.models.tokenizer import byte_tokenizer

Rows = list[dict[str, Any]]


def notes(configure: Callable[..., Config], splits: dict[Any, Rows], task: str = "classification", **data: Any) -> str:
    """Return the notes about these rows, given to two clients at random; one per line."""
    config = configure({"source": "files", "files": {"train": "-"}} | data, clients={"count": 2}, task=task)
    columns = {split: {name: [row.get(name) for row in given] for name in given[0]} for split, given in splits.items()}
    return notes_of(config, [RawRows(split, columns[split], split) for split in splits])


def notes_of(config: Config, parts: Sequence[RawRows]) -> str:
    source = assemble(parts, config.data, config.task)
    kept = subsample(source, config.data, 0)
    of_common = kept.field("split") == "common"
    assigned, common = np.flatnonzero(~of_common), np.flatnonzero(of_common)
    owned = partition(kept.take(assigned), config.partition, 2, 0)
    held = {client: {split: assigned[own] for split, own in splits.items()} for client, splits in owned.items()}
    return "\n".join(data_notes(source, kept, held, common, config.data))


def rows(count: int, classes: int = 2, start: int = 0) -> Rows:
    return [{"text": f"text {i}", "label": f"class {i % classes}"} for i in range(start, start + count)]


def test_ordinary_data_has_no_notes(configure: Callable[..., Config]) -> None:
    splits = {"train": rows(100), "validation": rows(30, start=100), "test": rows(50, start=200)}
    assert notes(configure, splits) == ""
    assert notes(configure, {"train": rows(30, classes=15)}) == "", "few examples per class, but classes"
    assert notes(configure, {"train": rows(100, classes=50)}, max_per_class=1, max_test_examples=1) == ""


def test_labels_that_hardly_occur_twice(configure: Callable[..., Config]) -> None:
    expected = "data.label: the column 'label' has 60 classes in 100 training examples; is it a column of texts"
    assert notes(configure, {"train": rows(100, classes=60)}).startswith(expected)
    assert notes(configure, {"train": rows(100, classes=60)}, label="text").startswith(
        "data.label: the column 'text' has 100 classes in 100 training examples"
    )


def test_a_class_that_nearly_all_have(configure: Callable[..., Config]) -> None:
    """97 and 94 of 100 examples."""
    rare = [{"text": f"rare {i}", "label": "rare"} for i in range(6)]
    others = {"validation": rows(20, 1, 800), "test": rows(20, 1, 500)}
    found = notes(configure, {"train": [*rows(97, classes=1), *rare[:3]]} | others)
    assert found.startswith("97 of 100 training examples have the same class, 'class 0': a model that always gives it")
    assert "matthews" in found
    assert notes(configure, {"train": [*rows(94, classes=1), *rare]} | others) == ""


@pytest.mark.parametrize("task", ["regression", "causal_lm"])
def test_a_constant_label_of_other_tasks(configure: Callable[..., Config], task: str) -> None:
    same = [{"text": f"text {i}", "label": 1.5} for i in range(40)]
    found = notes(configure, {"train": same}, task, prompt="{text}", answer="{label}")
    assert "training examples have the same" in found
    assert "'1.5'" in found
    assert "matthews" not in found


def test_texts_that_are_trained_on_and_tested(configure: Callable[..., Config]) -> None:
    """Three of twenty, whatever their labels and blanks."""
    again = [{"text": f" text  {i}\n", "label": "class 1"} for i in (4, 7, 9)]
    splits = {"train": rows(100), "validation": rows(20, start=200), "test": [*again, *rows(17, start=300)]}
    found = notes(configure, splits)
    assert re.fullmatch(
        r"test examples with the text of a training example: 3 of 20, such as 'text [479]'; the test results are too "
        "good by what the model remembers of them",
        found,
    )


def test_texts_that_are_trained_on_and_in_the_common_test_set(configure: Callable[..., Config]) -> None:
    """Five of eleven; the clients' own test examples are others."""
    common = [*rows(5, start=20), *rows(6, start=400)]
    others = {"validation": rows(20, start=200), "test": rows(20, start=300)}
    found = notes(configure, {"train": rows(100), **others, "common": common})
    assert re.fullmatch(
        r"common test examples with the text of a training example: 5 of 11, such as 'text 2\d'; the common test "
        "results are too good by what the model remembers of them",
        found,
    )


def test_texts_that_occur_twice_and_are_held_out(configure: Callable[..., Config]) -> None:
    """Every text twice: a quarter is held out for testing, and most of it is trained on elsewhere."""
    found = notes(configure, {"train": [*rows(100), *rows(100)]})
    assert "validation examples with the text of a training example" in found
    assert "test examples with the text of a training example" in found


def test_pairs_and_prompts_are_compared_whole(configure: Callable[..., Config]) -> None:
    train = [{"text": f"a {i}", "pair": f"b {i}", "label": i % 2} for i in range(40)]
    other = [{"text": f"a {i}", "pair": f"c {i}", "label": i % 2} for i in range(40)]
    assert notes(configure, {"train": train, "validation": other[:9], "test": other[9:]}, text_pair="pair") == ""
    templates = {"prompt": "{text}", "answer": "{pair}"}
    assert (
        notes(configure, {"train": train, "validation": other[:9], "test": other[9:]}, "causal_lm", **templates) == ""
    )
    found = notes(configure, {"train": train, "validation": train[:9], "test": other}, "causal_lm", **templates)
    assert found.startswith("validation examples with the text of a training example: 9 of 9, such as 'a ")


def test_an_optional_field_that_no_file_has(configure: Callable[..., Config]) -> None:
    train = [{"question": f"q {i}", "input": "", "answer": f"a {i}"} for i in range(40)]
    found = notes(configure, {"train": train}, "causal_lm", prompt="{question}{inptu?: ({inptu})}{input?}{more?}")
    assert found.splitlines() == [
        "data.prompt: no file has the column 'inptu' (did you mean 'input'?), so its field is always empty",
        "data.prompt: no file has the column 'more', so its field is always empty",
    ]


def test_the_loaded_data_has_the_notes(configure: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("text,label\n" + "".join(f"text {i},{int(i == 0)}\n" for i in range(80)))
    config = configure({"source": "files", "files": {"train": str(tmp_path / "x.csv")}}, clients={"count": 2})
    (note,) = load_federated_data(config, byte_tokenizer()).notes
    assert "training examples have the same class, '0'" in note


@pytest.mark.parametrize(
    ("name", "files", "label", "expected"),
    [
        ("clinc150", ("train.jsonl", "test.jsonl"), "intent", "2 of 4,500"),
        ("banking77", ("train.csv", "test.csv"), "category", "7 of 3,080"),
        ("snips", ("train.jsonl", "test.jsonl"), "intent", "26 of 700"),
    ],
)
def test_known_overlaps_of_real_data(
    configure: Callable[..., Config],
    shared_data: Path,
    name: str,
    files: tuple[str, str],
    label: str,
    expected: str,
) -> None:
    paths = dict(zip(("train", "test"), (str(shared_data / name / file) for file in files), strict=True))
    data = {"source": "files", "files": paths, "label": label}
    config = configure(data, {"validation_fraction": 0}, clients={"count": 2})
    note = notes_of(config, list(config.data.load(config.task, 0, 2)))
    assert f"test examples with the text of a training example: {expected}, such as" in note
