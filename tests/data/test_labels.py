"""Labels over files and splits: equal ones are one class, and what training lacks is refused."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedray.data.examples import Examples, assemble
from fedray.data.sources.files import Files
from fedray.data.subsample import subsample
from fedray.errors import DataError
from fedray.types import Task


def load(folder: Path, task: Task = "classification", **labels: Any) -> Examples:
    """Return examples of splits or clients, each from a file whose kind is the name's second part."""
    files = {}
    for name, values in labels.items():
        key, kind = name.split("_")
        path = folder / f"{key}.{kind}"
        texts = [f"{key} {i}" for i in range(len(values))]
        if kind == "csv":
            path.write_text("text,label\n" + "".join(f"{t},{v}\n" for t, v in zip(texts, values, strict=True)))
        elif kind == "jsonl":
            rows = [{"text": text, "label": value} for text, value in zip(texts, values, strict=True)]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            pq.write_table(pa.table({"text": texts, "label": values}), path)
        files[key] = str(path)
    data = Files.model_validate({"files": files})
    return assemble(list(data.load(task, 0, None)), data, task)


def test_equal_labels_are_one_class_in_all_kinds_of_files(tmp_path: Path) -> None:
    """Ten of each class, over six ways of writing it."""
    examples = load(
        tmp_path,
        a_csv=["0", " 1", "0.0", "1.0 "],
        b_jsonl=[0, 1, 0.0, 1.0, "0", "1"],
        c_parquet=pa.array([0.0, 1.0]),
        test_parquet=pa.array([0, 1, 0, 1]),
        validation_csv=["01", "00", "1.", " 0"],
    )
    assert examples.label_names == ("0", "1")
    assert sorted(examples.table["label"].to_pylist()) == ["0"] * 10 + ["1"] * 10
    # Partitioners that are told the column by its own name see the same classes.
    assert examples.values("label").tolist() == examples.table["label"].to_pylist()
    data = Files.model_validate({"files": {"train": "-"}, "max_per_class": 2})
    kept = subsample(examples, data, 0)
    assert sorted(kept.field("label")[kept.field("split") == "train"]) == ["0", "0", "1", "1"]


def test_booleans_are_named_alike_in_all_kinds_of_files(tmp_path: Path) -> None:
    examples = load(tmp_path, train_jsonl=[True, False], test_csv=["True", " False"], validation_parquet=[False, True])
    assert examples.label_names == ("False", "True")


@pytest.mark.parametrize("split", ["validation", "test"])
def test_an_unlabelled_split_is_refused(tmp_path: Path, split: str) -> None:
    with pytest.raises(DataError) as caught:
        load(tmp_path, train_jsonl=[0, 1, 1], **{f"{split}_csv": ["1", "-1", "-1"]})
    message = str(caught.value)
    assert f"{split}.csv: line 3: column 'label': 2 examples have classes that no training example has: '-1'" in message
    assert "classes of the training examples: '0', '1'; -1 usually marks a split whose labels are not pub" in message
    assert "taken from each client's training examples, or name another one" in message


def test_classes_that_training_lacks_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load(tmp_path, train_csv=["ham", "spam"], test_csv=["ham", "Spam", "egg"])
    message = str(caught.value)
    assert "test.csv: line 3: column 'label': 2 examples" in message
    assert "has: 'Spam', 'egg' (did you mean 'spam'?); classes of the training examples: 'ham', 'spam'" in message
    assert "-1 usually" not in message


def test_a_class_of_the_test_split_alone_makes_no_second_class(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="single class 'a'"):
        load(tmp_path, train_csv=["a", "a"], test_csv=["a", "b"])


def test_minus_one_may_be_a_class(tmp_path: Path) -> None:
    assert load(tmp_path, train_csv=["-1", "0", "1"], test_csv=["-1"]).label_names == ("-1", "0", "1")


def test_numbers_in_text_are_numbers_in_a_regression(tmp_path: Path) -> None:
    examples = load(tmp_path, "regression", train_csv=[" 1.5", "2 ", "-3e-1"], test_jsonl=["-1", -1, 4])
    assert examples.table["label"].to_pylist() == [1.5, 2.0, -0.3, -1.0, -1.0, 4.0]


def test_an_unlabelled_split_of_a_regression_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"test\.csv: line 2: column 'label': every label of the test split is -1"):
        load(tmp_path, "regression", train_csv=["0", "1.5"], test_csv=["-1", "-1.0"])
    assert len(load(tmp_path, "regression", train_csv=["-2", "1.5"], test_csv=["-1", "-1.0"])) == 4
