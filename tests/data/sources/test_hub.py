"""Hub datasets, from a folder written here."""

from pathlib import Path

import datasets
import pytest

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


def hub(folder: Path | str, **splits: str) -> Examples:
    data = Hub.model_validate({"name": str(folder), "splits": splits})
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
        ({"train": "train", "test": "hidden"}, ["split hidden: row 1: column 'label'", "got nothing"]),
    ],
)
def test_mistakes_about_a_dataset_are_located(hub_folder: Path, splits: dict[str, str], parts: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        hub(hub_folder, **splits)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_an_unreachable_hub_names_the_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> None:
        raise ConnectionError("Couldn't reach 'glue' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"data\.name: the dataset 'glue'.*Couldn't reach.*source: files.*HF_HOME"):
        hub("glue")
