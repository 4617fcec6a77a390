"""Configurations: what is written and read again is equal, defaults, and what methods override."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from small_config import SMALLEST

from fedray.config import Config, MethodSections, Section, dump_yaml, load_config, parse_yaml, to_mapping
from fedray.config.data import SOURCES
from fedray.config.partition import PARTITIONERS

# Text that YAML or fedray's loader could take for something else than text.
TREACHEROUS = st.sampled_from(
    [
        *(
            "1234e56",
            "1e5",
            "3E-4",
            ".5e1",
            "1.0",
            "007",
            "0x1f",
            "1_000",
            "1:30",
            "yes",
            "No",
            "null",
            "~",
            "2026-11-20",
        ),
        *("", " ", "a: b", "- a", "#", "'", '"', "{}", "[a]", "&a", "*a", "!!int 3", "%", "@", "<<", "=", "x\ny", "\t"),
        "\x00\x85\u2028",
    ]
)
TEXT = TREACHEROUS | st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8)
NUMBER = st.floats(1e-12, 1e12)
COUNT = st.integers(1, 10**9)
FRACTION = st.floats(0, 1, exclude_max=True)
WORD = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True)
SCALAR = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT
TREE = st.recursive(
    SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=5
)


def some(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Return mappings with any subset of the fields."""
    return st.fixed_dictionaries({}, optional=fields)


TRAIN = some(
    epochs=NUMBER,
    max_steps=st.none() | COUNT,
    lr=NUMBER,
    head_lr=st.none() | NUMBER,
    betas=st.tuples(FRACTION, FRACTION),
    clip=st.none() | NUMBER,
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
    round_schedule=st.sampled_from(["constant", "linear", "cosine"]),
    round_decay=st.floats(0, 1, exclude_min=True),
)
LORA = some(rank=COUNT, alpha=NUMBER, dropout=FRACTION, targets=st.lists(TEXT, max_size=3))
REFT = some(
    kind=st.sampled_from(["loreft", "noreft", "direft", "nodireft"]),
    layers=st.just("all") | st.lists(st.integers(0, 99), max_size=3),
    positions=st.sampled_from(["all", "f1", "l2", "f7+l7"]),
    tie_positions=st.booleans(),
    short_prompts=st.sampled_from(["prefix", "halves"]),
)
METHOD = st.tuples(
    st.sampled_from(["fedreft", "fedalt", "local"]).map(lambda name: {"name": name})
    | st.just({"class": "my_methods.Mine"}),
    some(
        head=st.sampled_from(["shared", "local", "frozen_label_text", "frozen_random"]),
        lora=LORA,
        reft=REFT,
        train=TRAIN,
        lam=NUMBER,
        mixing=TEXT,
        options=TREE,
    ),
).map(lambda parts: parts[0] | parts[1])
# Shares in eighths add up to 1 exactly.
TIERS = st.sampled_from([(8,), (4, 4), (1, 7), (2, 2, 4)]).flatmap(
    lambda eighths: st.lists(WORD, min_size=len(eighths), max_size=len(eighths), unique=True).map(
        lambda names: {name: {"share": share / 8} for name, share in zip(names, eighths, strict=True)}
    )
)
DATA = st.one_of(
    some(text=TEXT, prompt=TEXT, libraries=st.lists(TEXT, max_size=2)).map({"source": "docstrings"}.__or__),
    some(config=TEXT, splits=some(train=TEXT, test=TEXT)).map({"source": "hub", "name": "x"}.__or__),
    some(groups=COUNT, conflict=FRACTION, max_length=st.integers(4, 10**6)).map({"source": "synthetic"}.__or__),
)
PARTITION = st.one_of(
    some(test_fraction=FRACTION),
    some(alpha=NUMBER, column=st.none() | TEXT, test_fraction=FRACTION).map({"kind": "dirichlet"}.__or__),
    some(classes_per_client=COUNT, min_examples=COUNT).map({"kind": "shards"}.__or__),
    TEXT.filter(bool).map(lambda column: {"kind": "by_column", "column": column}),
)
CLIENTS = st.integers(1, 1000).flatmap(
    lambda count: some(
        count=st.just(count),
        per_round=st.integers(1, count),
        num_gpus=st.floats(0, 1) | st.sampled_from([2.0, 8.0]),
        tiers=st.just({}) | TIERS,
    )
)


@st.composite
def mappings(draw: st.DrawFn) -> dict[str, Any]:
    """Valid configurations, with every section present or left out."""
    methods = draw(st.lists(METHOD, min_size=1, max_size=3))
    for index, method in enumerate(methods):
        method["label"] = f"{index}-{draw(WORD)}"
    required: dict[str, Any] = {"rounds": draw(COUNT), "method": methods, "data": {"source": "docstrings"}}
    required["model"] = {"path": "random", "config": {"model_type": "bert", "x": draw(TREE)}, "tokenizer": draw(TEXT)}
    tasks = ["classification", "causal_lm"]
    if all(method.get("head") != "frozen_label_text" for method in methods):
        tasks.append("regression")  # it has no label names
    optional = some(
        name=WORD,
        seed=st.integers(0, 2**63),
        task=st.sampled_from(tasks),
        data=DATA,
        partition=PARTITION,
        clients=CLIENTS,
        lora=LORA,
        reft=REFT,
        train=TRAIN,
        storage_path=TEXT,
    )
    return required | draw(optional)


@settings(max_examples=50)
@given(mappings())
def test_yaml_there_and_back_is_equal(mapping: dict[str, Any]) -> None:
    config = load_config(mapping)
    text = dump_yaml(config)
    again = load_config(parse_yaml(text, "text"))
    assert again == config
    assert dump_yaml(again) == text
    assert load_config(config) == config


@settings(max_examples=50)
@given(mappings())
def test_what_was_given_is_what_is_held(mapping: dict[str, Any]) -> None:
    """Fields given are kept as given, up to tuples for lists: nothing is dropped, rounded or replaced by a default."""

    def held(given: Any, value: Any) -> None:
        if isinstance(value, BaseModel):
            for key, entry in given.items():
                held(entry, getattr(value, "class_" if key == "class" else key))
        elif isinstance(given, dict):
            assert set(given) == set(value)
            for key, entry in given.items():
                held(entry, value[key])
        elif isinstance(given, list | tuple):
            assert len(given) == len(value)
            for left, right in zip(given, value, strict=True):
                held(left, right)
        else:
            assert given == value
            assert isinstance(value, bool) == isinstance(given, bool)

    held(mapping, load_config(mapping))


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(SMALLEST), encoding="utf-8")
    assert load_config(path) == load_config(str(path)) == load_config(SMALLEST)


def test_defaults_are_those_of_the_smallest_configuration() -> None:
    config = load_config(SMALLEST)
    assert (config.name, config.seed, config.task, config.runtime) == ("run", 0, "classification", "ray")
    assert [entry.key for entry in config.method] == ["fedreft"]
    assert config.lora.alpha / config.lora.rank == 2  # the scale s of the default branch


def test_a_configuration_is_frozen() -> None:
    config = load_config(SMALLEST)
    with pytest.raises(ValidationError, match="frozen"):
        config.rounds = 3  # type: ignore[misc]


# --- methods --------------------------------------------------------------------------------------------------------


def test_a_name_a_mapping_and_a_list_mean_the_same() -> None:
    configs = [load_config(SMALLEST | {"method": m}) for m in ("fedalt", {"name": "fedalt"}, ["fedalt"])]
    assert configs[0] == configs[1] == configs[2]


def test_keys_are_label_then_name_then_class() -> None:
    entries = [{"name": "a", "label": "first"}, {"name": "b"}, {"class": "my.module.Mine"}]
    assert [entry.key for entry in load_config(SMALLEST | {"method": entries}).method] == ["first", "b", "Mine"]


def test_hyperparameters_are_the_keys_of_the_method_itself() -> None:
    own = {"mixing": "learned", "lam": 0.5, "nested": {"a": [1]}}
    config = load_config(SMALLEST | {"method": {"name": "fedreft", "head": "local", "reft": {"rank": 2}, **own}})
    assert config.method[0].hyperparameters == own
    assert load_config(parse_yaml(dump_yaml(config), "text")).method[0].hyperparameters == own


def test_sections_of_a_method_override_the_common_ones() -> None:
    config = load_config(
        SMALLEST
        | {
            "head": "local",
            "lora": {"rank": 3, "alpha": 6},
            "method": [
                {"name": "fedalt", "lora": {"rank": 5}, "train": {"lr": 0.1}, "head": "shared"},
                {"name": "local"},
            ],
        }
    )
    own, common = (config.section_for(entry) for entry in config.method)
    assert (own.head, own.lora.rank, own.lora.alpha, own.train.lr) == ("shared", 5, 6, 0.1)
    assert (common.head, common.lora, common.reft, common.train) == ("local", config.lora, config.reft, config.train)


def _derived(cls: type[Section]) -> list[type[Section]]:
    """Return the class's subclasses, and theirs."""
    return [derived for child in cls.__subclasses__() for derived in (child, *_derived(child))]


def test_every_plain_field_is_documented() -> None:
    """The texts under the fields are their documentation; a new field without one fails here."""
    for registry in (SOURCES, PARTITIONERS):
        assert all(issubclass(registry.find(name), Section) for name in registry.names)
    sections = [section for section in _derived(Section) if section.__module__.startswith("fedray.")]
    pairs = [(section, name) for section in sections for name in section.model_fields]
    documented = {f"{section.__name__}.{name}" for section, name in pairs if section.model_fields[name].description}
    of_sections = {"checkpoint", "model", "data", "partition", "clients", "lora", "reft", "train", "evaluation"}
    expected = {
        f"{section.__name__}.{name}"
        for section, name in pairs
        if section is not MethodSections and (section is not Config or name not in of_sections)
    }
    assert expected - documented == set()


def test_to_mapping_holds_every_field() -> None:
    mapping = to_mapping(load_config(SMALLEST))
    assert set(mapping) == set(Config.model_fields)
    assert mapping["method"][0]["name"] == "fedreft"
    assert "class" in mapping["method"][0]
