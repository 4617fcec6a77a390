"""A source and a partitioner of a user's own, each one file in the current folder."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from examples import EXAMPLES
from small_config import message_of
from tiny import tiny_bert

import fedray
from fedray.config import RawRows, dump_yaml, load_config, parse_yaml
from fedray.data.load import load_federated_data
from fedray.errors import DataError
from fedray.models.tokenizer import byte_tokenizer
from fedray.sweeps.shared import _data_key

NATURAL = """
from fedray.config import NaturalClients, PartitionConfig

class ByFirstWord(PartitionConfig):
    def assign(self, examples, train, num_clients, rng):
        return NaturalClients(examples.field("text").astype("U5"), "the first words")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with both files and forty lines of each of two classes; line i has i + 6 characters."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    files = {"my_source": EXAMPLES["my_source.py"], "my_partition": EXAMPLES["my_partition.py"], "my_natural": NATURAL}
    for name, code in files.items():
        (tmp_path / f"{name}.py").write_text(code)
    for name in ("green", "white"):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} {'x' * i}\n" for i in range(40)))
    yield tmp_path
    for name in files:
        sys.modules.pop(name, None)


def experiment(**changes: Any) -> dict[str, Any]:
    return {
        "rounds": 1,
        "method": "fedavg",
        "model": tiny_bert(),
        "data": {"class": "my_source.TextFolder", "folder": ".", "max_length": 16, "cache_dir": "cache"},
        "partition": {"class": "my_partition.ByLength", "overlap": 0.0, "test_fraction": 0.1},
        "clients": {"count": 2},
        "runtime": "inline",
    } | changes


def test_a_run_uses_both(folder: Path) -> None:
    """Of 80 lines each client gets the 40 of its lengths, so its longest line tells the clients apart."""
    config = load_config(experiment())
    data = load_federated_data(config, byte_tokenizer())
    assert [sum(t.num_rows for t in shard.tables.values()) for shard in data.shards.values()] == [40, 40]
    assert data.label_names == ("green", "white")
    result = fedray.run(config, output=folder / "run")
    assert result["fedavg"].rounds == 1
    again = load_config(parse_yaml((folder / "run" / "config.yaml").read_text(), "file"))
    assert again == config.with_absolute_paths(Path.cwd())
    assert parse_yaml(dump_yaml(config), "text")["partition"]["overlap"] == 0.0
    resumed = fedray.run(again, resume=folder / "run", rounds=2)
    assert resumed["fedavg"].rounds == 2


def test_an_own_source_is_a_part_of_several(folder: Path) -> None:
    part = {"class": "my_source.TextFolder", "folder": "."}
    data = {"source": "several", "max_length": 16, "cache_dir": "cache", "parts": {"lines": part}}
    config = load_config(experiment(data=data, partition={"kind": "by_file", "test_fraction": 0.1}, clients={}))
    absolute = config.with_absolute_paths(Path.cwd())
    assert load_config(parse_yaml(dump_yaml(absolute), "file")) == absolute
    assert list(load_federated_data(absolute, byte_tokenizer()).shards) == ["lines"]


def test_clients_that_the_data_names(folder: Path) -> None:
    config = load_config(experiment(partition={"class": "my_natural.ByFirstWord"}, clients={}))
    assert list(load_federated_data(config, byte_tokenizer()).shards) == ["green", "white"]
    with pytest.raises(DataError, match=r"3 clients, but the training examples hold 2 \(the first words\)"):
        load_federated_data(load_config(config, {"clients.count": 3}), byte_tokenizer())


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (
            "data.foldr",
            ".",
            "data.foldr: unknown key (did you mean 'folder'?); allowed: answer, cache_dir, chat_template, choice_",
        ),
        ("data.folder", 3, "data.folder: got 3: Input should be a valid string"),
        ("partition.overlp", 1, "partition.overlp: unknown key (did you mean 'overlap'?); allowed: class, kind, min_"),
        ("partition.overlap", 2, "partition.overlap: got 2: Input should be less than or equal to 1"),
        ("data.class", "my_source.Path", "data.class: my_source.Path must be a class derived from fedray.config.data."),
        ("data.class", "my_partition.ByLength", "data.class: my_partition.ByLength must be a class derived from"),
        ("partition.class", "my_source.TextFolder", "partition.class: my_source.TextFolder must be a class derived"),
        ("partition.class", "my_partition.ByLenght", "partition.class: class 'my_partition.ByLenght' cannot be imp"),
        ("partition.kind", "iid", "partition.class: expected either `kind` (built in) or `class` (module.Class of"),
    ],
)
def test_mistakes_are_named(folder: Path, path: str, value: object, expected: str) -> None:
    assert message_of(experiment(), {path: value}).splitlines()[0].startswith(f"configuration: {expected}")


def test_a_required_field_is_missed(folder: Path) -> None:
    assert message_of(experiment(data={"class": "my_source.TextFolder"})) == "configuration: data.folder: missing"


def test_the_source_s_own_message_comes_through(folder: Path) -> None:
    with pytest.raises(DataError, match=r"^data\.folder: no \.txt file in cache$"):
        load_federated_data(load_config(experiment(), {"data.folder": "cache"}), byte_tokenizer())


def test_trials_of_a_sweep_share_data_only_where_the_own_fields_agree(folder: Path) -> None:
    config = load_config(experiment())
    keys = [_data_key(load_config(config, {path: value})) for path, value in
            (("rounds", 3), ("data.folder", "./"), ("partition.overlap", 0.5))]  # fmt: skip
    assert [key == _data_key(config) for key in keys] == [True, False, False]


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ("bands, np.eye(count) * 0.9", "every column must add up to 1"),
        ("bands[:-1], np.eye(count)", "partition my_partition.ByLength: assigns 79 examples, but the data has 80"),
        ("bands + 1, np.eye(count)", "`strata` holds 2, but `shares` has 2 columns"),
        ("bands, np.eye(count), names=['a']", "1 `names` for 2 clients"),
    ],
)
def test_shares_that_cannot_be_are_refused(folder: Path, shares: str, message: str) -> None:
    code = EXAMPLES["my_partition.py"].replace(
        "bands, (1 - self.overlap) * np.eye(count) + self.overlap / count", shares
    )
    (folder / "my_partition.py").write_text(code)
    with pytest.raises(DataError, match=message):
        load_federated_data(load_config(experiment()), byte_tokenizer())


def test_raw_rows_that_cannot_be_are_refused() -> None:
    with pytest.raises(DataError, match=r"^x\.csv: column 'label' has 1 values, but 'text' has 2$"):
        RawRows("x.csv", {"text": ["a", "b"], "label": ["c"]})
    with pytest.raises(DataError, match="^x: column 'text' has 1 values, but rows has 2$"):
        RawRows("x", {"text": ["a"]}, rows=[1, 2])
    with pytest.raises(DataError, match=r"^x: unknown split 'trian' \(did you mean 'train'\?\); allowed: train, "):
        RawRows("x", {"text": ["a"]}, split="trian")  # type: ignore[arg-type]
