"""Hub datasets: from a folder that `datasets` saved, from a folder as the hub has it, and from a local cache."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pytest
from partitioning import assign

from fedray.data.examples import Examples, assemble
from fedray.data.sources.hub import Hub
from fedray.errors import DataError


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    splits = {"train": [0, 1, 1], "dev": [1, 0], "hidden": [-1]}
    made = {
        name: datasets.Dataset.from_dict(
            {"text": [f"{name} {i}" for i in range(len(labels))], "label": labels}, features
        )
        for name, labels in splits.items()
    }
    folder = tmp_path_factory.mktemp("hub") / "answers"
    datasets.DatasetDict(made).save_to_disk(str(folder))
    return folder


def hub(folder: Path | str, config: str | None = None, **splits: str) -> Examples:
    data = Hub.model_validate({"name": str(folder), "config": config, "splits": splits})
    return assemble(data.load("classification", 0, None), data, "classification")


def test_a_local_dataset_folder_with_named_splits_and_classes(hub_folder: Path) -> None:
    examples = hub(hub_folder, train="train", test="dev")
    assert examples.table["label"].to_pylist() == ["no", "yes", "yes", "yes", "no"]
    assert examples.field("split").tolist() == ["train"] * 3 + ["test"] * 2
    assert set(examples.field("file")) == {"answers"}
    assert len(hub(hub_folder)) == 3


@pytest.mark.parametrize(
    ("splits", "parts"),
    [
        ({"train": "trian"}, ["data.splits.train", "did you mean 'train'", "train, dev, hidden"]),
        ({"test": "dev"}, ["data.splits", "serves as train"]),
        ({"train": "dev+trian[:2]"}, ["data.splits.train", "has no split 'trian'", "did you mean 'train'"]),
        ({"train": "train[:2", "test": "dev"}, ["data.splits.train: 'train[:2'", "a slice is written as in train[:1"]),
        ({"train": "train", "test": "dev[5:]"}, ["data.splits.test: 'dev[5:]' has no rows: the split 'dev' has 2"]),
        ({"train": "train[:300%]"}, ["data.splits.train: 'train[:300%]'", "Percent slice boundaries"]),
        ({"train": "train", "test": "hidden"}, ["split hidden: row 1: column 'label'", "got nothing"]),
    ],
)
def test_mistakes_about_a_dataset_are_located(hub_folder: Path, splits: dict[str, str], parts: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        hub(hub_folder, **splits)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize(
    ("split", "rows"),
    [
        ("train[:10]", range(10)),
        ("train[-5:]", range(55, 60)),
        ("train[10%:20%]", range(6, 12)),
        ("train[50%:]", range(30, 60)),
        ("train[:1000]", range(60)),
        ("train[58:]+train[:2]", [58, 59, 0, 1]),
    ],
)
def test_slices_of_splits(repository: Path, split: str, rows: Sequence[int]) -> None:
    """As `datasets.load_dataset(..., split=...)` reads them; a row's number is that in the whole split."""
    examples = hub(repository, train=split, test="train[20:22]")
    training = examples.take(np.flatnonzero(examples.field("split") == "train"))
    assert training.field("text").tolist() == [f"data/train-{i // 30:05d} {i % 30}" for i in rows]
    assert training.field("text").tolist() == datasets.load_dataset(str(repository), "all", split=split)["text"][:]
    assert examples.place(0) == f"{repository}, split train: row {rows[0] + 1}"
    assert examples.field("text").tolist()[-2:] == ["data/train-00000 20", "data/train-00000 21"]


def test_a_slice_of_several_splits(repository: Path, hub_folder: Path) -> None:
    examples = hub(repository, train="train[:2] + test[:50%]")
    assert examples.field("split").tolist() == ["train"] * 6
    assert examples.field("text").tolist()[1:3] == ["data/train-00000 1", "data/test 0"]
    assert hub(hub_folder, train="train[1:]+dev").table["label"].to_pylist() == ["yes", "yes", "yes", "no"]


def test_an_unreachable_hub_names_the_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> None:
        raise ConnectionError("Couldn't reach 'glue' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"data\.name: the dataset 'glue'.*Couldn't reach.*source: files.*HF_HOME"):
        hub("glue")


CARD = """---
license: cc0-1.0
configs:
- config_name: all
  default: true
  data_files:
  - split: train
    path: data/train-*.jsonl
  - split: test
    path: data/test.jsonl
- config_name: few
  data_files: few.jsonl
- config_name: broken
  data_files: broken.jsonl
dataset_info:
- config_name: all
  features:
  - {name: text, dtype: string}
  - {name: label, dtype: {class_label: {names: {'0': 'no', '1': 'yes'}}}}
  - {name: speaker, dtype: string}
---
# Answers by speaker
"""
SPEAKERS = ("北京", "Zoë", "b c")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset as it is on the hub: a card that names configurations, and the data files of their splits."""
    folder = tmp_path / "repositories" / "said"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    for name, count in (("data/train-00000", 30), ("data/train-00001", 30), ("data/test", 9), ("few", 4)):
        rows = [{"text": f"{name} {i}", "label": i % 2, "speaker": SPEAKERS[i % 3]} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home" / "datasets")
    return folder


def test_a_folder_in_the_layout_of_the_hub(repository: Path) -> None:
    """The card's default configuration with its splits and class names; the column of speakers makes the clients."""
    examples = hub(repository)
    assert examples.label_names == ("no", "yes")
    split = examples.field("split")
    assert [(split == name).sum() for name in ("train", "test")] == [60, 9]
    clients = assign(examples, "by_column", None, column="speaker")
    assert sorted(clients) == sorted(SPEAKERS)
    for speaker, splits in clients.items():
        rows = [row for rows in splits.values() for row in rows]
        assert len(rows) == 23
        assert set(examples.values("speaker")[rows]) == {speaker}
        assert set(split[splits["test"]]) == {"test"}
    assert hub(repository, "few").table["label"].to_pylist() == ["0", "1", "0", "1"]
    with pytest.raises(DataError, match="could not be loaded: .*'many'.*'all', 'few', 'broken'"):
        hub(repository, "many")
    (repository / "broken.jsonl").write_text("{oops")
    with pytest.raises(DataError, match=r"could not be loaded: An error occurred.*: JSON parse error"):
        hub(repository, "broken")


def test_a_dataset_in_a_local_cache_needs_no_hub(repository: Path, tmp_path: Path) -> None:
    """A prepared cache below HF_HOME has the same form however the files came to this machine: of a dataset of
    `somebody`, the folder's name begins with the owner's."""
    datasets.load_dataset(str(repository), "all")
    cache = tmp_path / "home" / "datasets"
    (cache / "said").rename(cache / "somebody___said")
    (tmp_path / "repositories").rename(tmp_path / "gone")
    program = (
        "import json, sys; from fedray.data.sources.hub import Hub\n"
        "parts = Hub(source='hub', name='somebody/said').load('classification', 0, None)\n"
        "print(json.dumps([(part.split, part.columns) for part in parts]))"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_DATASETS_CACHE", None)
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=200
    )
    assert ended.returncode == 0, ended.stderr
    (train, columns), (test, others) = json.loads(ended.stdout.splitlines()[-1])
    assert (train, len(columns["text"]), test, len(others["text"])) == ("train", 60, "test", 9)
    assert columns["label"][:3] == ["no", "yes", "no"]
    assert others["speaker"][:3] == list(SPEAKERS)
