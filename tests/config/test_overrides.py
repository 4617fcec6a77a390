"""Values of the command line: a field of text takes them as they are written, every other field reads YAML."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_config import SMALLEST

from fedray.config import load_config, load_sweep, parse_overrides
from fedray.errors import ConfigError

FILES = SMALLEST | {"data": {"source": "files", "files": {"train": "a.csv"}}, "task": "causal_lm"}
TIERS = SMALLEST | {"clients": {"tiers": {"a": {"share": 1}}}, "method": [{"name": "fedavg"}, "local"]}


def loaded(source: dict[str, Any], *arguments: str) -> Any:
    return load_config(source, parse_overrides(list(arguments)))


@given(st.text(st.characters(exclude_categories=["Cs"])), st.sampled_from(["prompt", "answer", "text", "cache_dir"]))
def test_text_is_taken_as_it_is_written(text: str, field: str) -> None:
    assert getattr(loaded(FILES, f"data.{field}={text}").data, field) == text


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda text: text != "null"))
def test_text_that_may_be_missing_is_text_too(text: str) -> None:
    config = loaded(FILES, f"data.text_pair={text}", f"model.revision={text}")
    assert (config.data.text_pair, config.model.revision) == (text, text)


NUMBERS = {
    "rounds": st.integers(1, 10**9),
    "train.lr": st.floats(1e-9, 1e3),
    "train.clip": st.none() | st.floats(1e-3, 1e3),
    "lora.targets": st.lists(st.from_regex(r"[a-z_]{2,8}_proj", fullmatch=True), max_size=3),
    "reft.layers": st.lists(st.integers(0, 40), min_size=1, unique=True) | st.just("all"),
    "clients.fuse": st.integers(2, 64) | st.sampled_from(["off", "auto"]),
    "clients.tiers": st.dictionaries(st.sampled_from("abc"), st.just({"clients": ["x"]}), max_size=1),
    "clients.tiers.a.num_gpus": st.sampled_from([0, 0.5, 2]),
    "checkpoint.best": st.booleans(),
    "device": st.sampled_from(["auto", "cpu"]),
    "method.0.head": st.sampled_from(["shared", "local"]),
    "method.0.lora.rank": st.integers(1, 8),
    "method.1": st.just("fedreft"),
    "model.config.hidden_size": st.integers(1, 4096),
    "evaluation.metric": st.sampled_from(["accuracy", {"name": "accuracy"}, None]),
    "partition": st.sampled_from([{"kind": "iid"}, {"kind": "dirichlet", "alpha": 0.5}]),
}


@pytest.mark.parametrize("path", NUMBERS)
@given(data=st.data())
def test_other_values_are_what_they_are_in_a_file(path: str, data: st.DataObject) -> None:
    value = data.draw(NUMBERS[path])
    written = value if isinstance(value, str) else json.dumps(value)
    assert loaded(TIERS, f"{path}={written}") == load_config(TIERS, {path: value})


@pytest.mark.parametrize(
    ("argument", "path", "expected"),
    [
        ("data.prompt={text}", "data.prompt", "{text}"),
        ("data.prompt=Question: {q}\n", "data.prompt", "Question: {q}\n"),
        ("data.text_pair=null", "data.text_pair", None),
        ("model.tokenizer=", "model.tokenizer", None),
        ("model.path=1e5", "model.path", "1e5"),
        ("name=007", "name", "007"),
        ("train.lr=1e-3", "train.lr", 1e-3),
        ("clients.fuse=off", "clients.fuse", "off"),
        ("data.files.train=*.csv", "data.files", {"train": "*.csv"}),
        ("data.files.train=2024", "data.files", {"train": "2024"}),
        ("data.files.train={a: a.csv}", "data.files", {"train": {"a": "a.csv"}}),
        ("data.source=docstrings", "data.source", "docstrings"),
    ],
)
def test_single_values(argument: str, path: str, expected: Any) -> None:
    found: Any = loaded(SMALLEST if "source" in argument else FILES, argument, "model.tokenizer=bytes")
    if path == "model.tokenizer":
        found = loaded({**FILES, "model": {"path": "x", "tokenizer": "bytes"}}, argument)
    for part in path.split("."):
        found = getattr(found, part)
    assert found == expected


def test_the_fields_of_an_entry_have_its_types() -> None:
    """Also if the same command line chooses the entry, or another entry has the field."""
    config = loaded(FILES, "partition.kind=by_column", "partition.column=no")
    assert config.partition.column == "no"
    assert loaded(FILES, "partition.column=no", "partition.kind=by_column").partition.column == "no"


def test_off_in_a_file_is_the_word() -> None:
    """YAML reads the bare word as false."""
    assert load_config(SMALLEST, {"clients": {"fuse": False}}).clients.fuse == "off"
    assert load_config(TIERS, {"clients.tiers.a.fuse": False}).clients.tiers["a"].fuse == "off"
    with pytest.raises(ConfigError, match=r"clients\.fuse: expected a number, got true"):
        load_config(SMALLEST, {"clients.fuse": True})


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("lora.targets=[q", r"override lora\.targets: not valid YAML"),
        ("rounds=many", "rounds: got 'many'"),
        ("data.promt={text", r"data\.promt: unknown key \(did you mean 'prompt'\?\)"),
        ("trian.lr={", r"trian: unknown key \(did you mean 'train'\?\)"),
        ("device=gpu", "device: got 'gpu'"),
        ("rounds.x=3", "override rounds.x: 'x' lies inside a plain value"),
        ("method.7.head=shared", "override method.7.head: '7' is not an index below 2"),
    ],
)
def test_mistakes(argument: str, message: str) -> None:
    source = TIERS if argument.startswith("method") else FILES
    with pytest.raises(ConfigError, match=message):
        loaded(source, argument)


def test_the_base_and_the_space_of_a_sweep() -> None:
    arguments = ["base.data.prompt={q}", "base.rounds=7", "space.train.lr=[1e-3, 1e-4]", "metric=train_loss"]
    sweep = load_sweep({"base": FILES, "space": {"seed": [0, 1]}}, parse_overrides(arguments))
    assert (sweep.base["data"]["prompt"], sweep.base["rounds"], sweep.metric) == ("{q}", 7, "train_loss")
    assert sweep.space == {"seed": [0, 1], "train.lr": [1e-3, 1e-4]}
