"""Configuration: what is read equals what was written, and every mistake is named with its place and a way out."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from fedray.config import (
    Config,
    MethodSections,
    Section,
    dump_yaml,
    load_config,
    parse_overrides,
    parse_yaml,
    to_mapping,
)
from fedray.errors import ConfigError

SMALLEST: dict[str, Any] = {
    "rounds": 2,
    "method": "fedreft",
    "model": {"path": "package:somewhere"},
    "data": {"source": "docstrings"},
}


def with_section(path: str, value: object) -> dict[str, Any]:
    """Return the smallest configuration with one dotted key set."""
    mapping: dict[str, Any] = yaml.safe_load(yaml.safe_dump(SMALLEST))
    *parents, last = path.split(".")
    target = mapping
    for part in parents:
        target = target.setdefault(part, {})
    target[last] = value
    return mapping


def message_of(source: Any, overrides: dict[str, Any] | None = None) -> str:
    """Return the message with which a configuration is refused."""
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    return str(caught.value)


# --- there and back -------------------------------------------------------------------------------------------------

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
    schedule=st.sampled_from(["constant", "linear"]),
    round_decay=st.floats(0, 1, exclude_min=True),
)
LORA = some(rank=COUNT, alpha=NUMBER, dropout=FRACTION, targets=st.lists(TEXT, max_size=3))
REFT = some(
    kind=st.sampled_from(["loreft", "noreft", "direft", "nodireft"]),
    layers=st.just("all") | st.lists(st.integers(0, 99), max_size=3),
    positions=st.sampled_from(["all", "f1", "l2", "f7+l7"]),
    tie_positions=st.booleans(),
)
METHOD = st.tuples(
    st.sampled_from(["fedreft", "fedalt", "local"]).map(lambda name: {"name": name})
    | st.just({"class": "my_methods.Mine"}),
    some(
        head=st.sampled_from(["shared", "local", "frozen_label_text"]),
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
        data=some(name=TEXT, prompt=TEXT, libraries=st.lists(TEXT, max_size=2)).map({"source": "docstrings"}.__or__),
        partition=some(alpha=NUMBER, column=st.none() | TEXT, test_fraction=FRACTION),
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


# --- YAML -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1e5", 1e5),
        ("-2E+3", -2e3),
        (".5e1", 5.0),
        ("1.e2", 100.0),
        ("1.5e-3", 1.5e-3),
        ("7", 7),
        ("0.5", 0.5),
        ("e5", "e5"),
        ("1e", "1e"),
        ("1e5x", "1e5x"),
        ("'1e5'", "1e5"),
        ("[1e-1, x]", [0.1, "x"]),
    ],
)
def test_numbers_in_scientific_notation(text: str, value: object) -> None:
    read = parse_yaml(text, "text")
    assert read == value
    assert type(read) is type(value)


def test_the_ordinary_yaml_loader_is_left_alone() -> None:
    assert yaml.safe_load("1e5") == "1e5"
    assert yaml.safe_dump("1e5") == "1e5\n...\n"


def test_numbers_reach_the_fields() -> None:
    config = load_config(parse_yaml(yaml.safe_dump(SMALLEST) + "train: {lr: 3e-4, max_steps: 1e2}\nseed: 1e5", "text"))
    assert config.train.lr == 0.0003
    assert config.train.max_steps == 100
    assert config.seed == 100_000


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rounds: 1\nseed: 2\nrounds: 3\n", "key 'rounds' twice .*line 3, column 1"),
        ("train:\n  lr: 1\n  lr: 2\n", "key 'lr' twice .*line 3, column 3"),
        ("method: [{name: a, name: b}]\n", "key 'name' twice .*line 1, column 20"),
        ("train: {lr: 1\nrounds: 3\n", "line 2, column"),
        ("a: b: c\n", "line 1, column 5"),
        ("a:\n\t- 1\n", "line 2, column 1"),
        ("? [a]\n: 1\n", r"\['a'\] as a key .*line 1, column 3"),
        ("a: *nowhere\n", "line 1, column 4"),
        ("!!python/object/apply:os.getcwd []\n", "line 1, column 1"),
        ("a: 1\n---\nb: 2\n", "line 2, column 1"),
        ("a: 2026-13-45\n", "month must be in 1..12"),
        ("[" * 1000, "not valid YAML"),
    ],
)
def test_malformed_yaml_names_file_line_and_column(text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=expected) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: not valid YAML: ")
    assert "\n" not in str(caught.value)


def test_merge_keys_are_read_and_may_be_overridden() -> None:
    text = "a: &common {rank: 4, alpha: 8}\nb: {<<: *common, rank: 2}\n"
    assert parse_yaml(text, "text")["b"] == {"rank": 2, "alpha": 8}


@pytest.mark.parametrize("content", [b"", b"- a\n", b"text", b"3\n"])
def test_a_file_without_sections(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "list.yaml"
    path.write_bytes(content)
    assert message_of(path).startswith(f"{path}: expected a mapping of sections, got ")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing, binary = tmp_path / "missing.yaml", tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert message_of(missing).startswith(f"{missing}: cannot be read: ")
    assert "No such file" in message_of(missing)
    assert message_of(binary).startswith(f"{binary}: cannot be read: ")
    assert message_of(tmp_path).startswith(f"{tmp_path}: cannot be read: ")


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("round", "rounds"),
        ("modle", "model"),
        ("model.pth", "path"),
        ("data.sources", "source"),
        ("partition.alhpa", "alpha"),
        ("clients.per_rounds", "per_round"),
        ("lora.rnk", "rank"),
        ("reft.position", "positions"),
        ("train.batchsize", "batch_size"),
        ("evaluation.evry", "every"),
        ("clients.tiers.phone.mask_ration", "mask_ratio"),
    ],
)
def test_an_unknown_key_gets_the_nearest_name(path: str, meant: str) -> None:
    lines = [line for line in message_of(with_section(path, 1)).splitlines() if "unknown key" in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"configuration: {path}: unknown key (did you mean {meant!r}?); allowed: ")


def test_an_unknown_key_lists_what_is_allowed_and_claims_no_likeness() -> None:
    expected = "configuration: lora.zzz: unknown key; allowed: alpha, dropout, rank, targets"
    assert message_of(with_section("lora.zzz", 1)) == expected


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        # wrong type
        ("rounds", "many", "rounds: got 'many': Input should be a valid integer"),
        ("rounds", 2.5, "rounds: got 2.5: Input should be a valid integer"),
        ("rounds", None, "rounds: got None: Input should be a valid integer"),
        ("lora", None, "lora: got None: Input should be a valid dictionary"),
        ("model.path", 3, "model.path: got 3: Input should be a valid string"),
        ("lora.targets", "q_proj", "lora.targets: got 'q_proj': Input should be a valid tuple"),
        ("method", 5, "method.0: got 5: Input should be a valid dictionary"),
        ("train.betas", [0.9], "train.betas"),
        # out of range
        ("rounds", 0, "rounds: got 0: Input should be greater than or equal to 1"),
        ("seed", -1, "seed: got -1: Input should be greater than or equal to 0"),
        ("lora.dropout", 1, "lora.dropout: got 1: Input should be less than 1"),
        ("lora.dropout", -0.1, "lora.dropout: got -0.1: Input should be greater than or equal to 0"),
        ("train.lr", 0, "train.lr: got 0: Input should be greater than 0"),
        ("train.lr", math.inf, "train.lr: got inf: Input should be a finite number"),
        ("train.lr", math.nan, "train.lr: got nan: Input should be"),
        ("train.betas", [0.9, 1], "train.betas.1: got 1: Input should be less than 1"),
        ("data.classes", 1, "data.classes: got 1: Input should be greater than or equal to 2"),
        ("clients.tiers", {"a": {"share": 1.5}}, "clients.tiers.a.share: got 1.5: Input should be less than or equal"),
        ("name", "../up", "name: got '../up': String should match pattern"),
        ("reft.positions", "first", "reft.positions: got 'first': String should match pattern"),
        # not among the choices
        ("task", "clasification", "did you mean 'classification'?"),
        ("data.source", "docstring", "did you mean 'docstrings'?"),
        ("data.splits", {"trian": "x"}, "did you mean 'train'?"),
        ("partition.kind", "by_colum", "did you mean 'by_column'?"),
        # true is not one
        ("rounds", True, "rounds: expected a number, got true"),
        ("train.lr", True, "train.lr: expected a number, got true"),
        ("train.max_steps", True, "train.max_steps: expected a number, got true"),
        ("train.clip", False, "train.clip: expected a number, got false"),
        ("clients.per_round", True, "clients.per_round: expected a number, got true"),
        ("clients.tiers", {"a": {"share": True}}, "clients.tiers.a.share: expected a number, got true"),
        ("train.betas", [True, 0.9], "train.betas: expected a number, got [true, 0.9]"),
        ("reft.layers", [True], "reft.layers: expected a number, got [true]"),
        # what one field says about another
        ("clients", {"count": 3, "per_round": 4}, "per_round is 4, but there are only 3 clients (clients.count)"),
        (
            "clients.tiers",
            {"phone": {"share": 0.5}, "laptop": {"share": 0.4}},
            "the shares of the tiers phone, laptop add up to 0.9; they must add up to 1",
        ),
        *[
            ("clients.tiers", {"phone": {"share": 1, **tier}}, expected)
            for tier, expected in (
                ({"clients": ["ann"]}, "clients.tiers.phone: a tier needs either `share` or `clients`"),
                ({"share": None}, "clients.tiers.phone: a tier needs either `share` or `clients`"),
                ({"offload": {"params": "cpu"}}, "phone: offload: needs engine: deepspeed, got engine: torch"),
                ({"deepspeed": {"zero_optimization": {}}}, "phone: deepspeed: needs engine: deepspeed"),
                ({"engine": "deepspeed", "offload": {"params": "nvme"}}, "params: nvme needs `path`"),
                ({"engine": "deepspeed", "offload": {"path": "/fast"}}, "path: only params: nvme writes to a folder"),
                (
                    {"resources": {"CPU": 3}},
                    "phone: resources: CPU have fields of their own: num_cpus",
                ),
                ({"reft_layers": []}, "clients.tiers.phone.reft_layers: got []: "),
                ({"engine": "deepsped"}, "clients.tiers.phone.engine: got 'deepsped': "),
                ({"precision": "float8"}, "clients.tiers.phone.precision: got 'float8': "),
                ({"mask_ratio": 0}, "clients.tiers.phone.mask_ratio: got 0: "),
                ({"num_gpus": 1.5}, "clients.tiers.phone.num_gpus: above 1, GPUs come whole"),
                ({"memory": "much"}, "clients.tiers.phone.memory: got 'much': "),
                ({"dropout": 1}, "clients.tiers.phone.dropout: got 1: "),
                ({"lora_rank": 9}, "clients.tiers.phone.lora_rank: 9 is above lora.rank 8 of method"),
            )
        ],
        ("clients", {"tiers": {n: {"clients": ["ann"]} for n in "ab"}}, "tiers: ann listed twice; a client belongs to"),
        ("clients", {"over_selection": 0.3}, "over_selection: needs per_round"),
        ("model", {"path": "random", "tokenizer": "bytes"}, "model.config: a random model needs `model_type`"),
        ("model", {"path": "random", "config": {"model_type": "bert"}}, "model.tokenizer: a random model has none"),
        ("data", {"source": "hub"}, "data.name: the source `hub` needs"),
        ("data", {"source": "files"}, "data.files: the source `files` needs"),
        ("partition.kind", "by_column", "partition.column: the partition `by_column` needs"),
        # methods
        ("method", [], "method: name at least one method"),
        ("method", {}, "method.0: a method needs either `name` (built in) or `class`"),
        ("method", {"name": "a", "class": "b.C"}, "method.0: a method needs either `name` (built in) or `class`"),
        ("method", ["fedalt", "fedalt"], "method: 'fedalt' occurs 2 times; give each entry a `label` of its own"),
        ("method", ["Mine", {"class": "x.Mine"}], "method: 'Mine' occurs 2 times"),
        ("method", {"name": "fedalt", "label": "a/b"}, "method: 'a/b' cannot name a folder"),
        ("method", {"name": "fedalt", "head": "privat"}, "method.0.head: got 'privat': "),
        ("method", {"name": "fedalt", "lora": 3}, "method.0.lora: got 3: Input should be a valid dictionary"),
    ],
)
def test_a_mistake_is_named_with_its_place(path: str, value: object, expected: str) -> None:
    message = message_of(with_section(path, value))
    assert expected in message
    assert message.startswith("configuration: ")


def test_numbers_where_booleans_belong_stay_booleans() -> None:
    assert load_config(with_section("reft.tie_positions", True)).reft.tie_positions is True


def test_shares_may_be_off_by_rounding_only() -> None:
    thirds = {name: {"share": 1 / 3} for name in "abc"}
    assert list(load_config(with_section("clients.tiers", thirds)).clients.tiers) == ["a", "b", "c"]
    assert "add up to 0.99;" in message_of(with_section("clients.tiers", {name: {"share": 0.33} for name in "abc"}))


def test_several_mistakes_at_once_have_a_line_each() -> None:
    lines = message_of({"rounds": 0, "method": "local", "data": {"source": "docstrings", "txt": "x"}}).splitlines()
    assert len(lines) == 3
    assert "configuration: model: missing" in lines
    assert "configuration: rounds: got 0: Input should be greater than or equal to 1" in lines
    assert any(line.startswith("configuration: data.txt: unknown key (did you mean 'text'?)") for line in lines)


@pytest.mark.parametrize("value", [{1, 2}, object(), b"bytes", 1 + 2j])
def test_python_values_that_yaml_could_not_hold(value: object) -> None:
    message = message_of(SMALLEST | {"method": {"name": "fedalt", "lam": value}})
    assert f"is of type {type(value).__name__}; allowed: text, numbers, lists, mappings, null" in message


def test_numpy_numbers_and_paths_are_taken(tmp_path: Path) -> None:
    config = load_config(
        SMALLEST
        | {"rounds": np.int64(3), "storage_path": tmp_path, "method": {"name": "fedalt", "lam": np.float32(0.5)}},
        {"train.lr": np.float64(0.25)},
    )
    assert (config.rounds, config.storage_path, config.train.lr) == (3, str(tmp_path), 0.25)
    assert config.method[0].hyperparameters == {"lam": 0.5}
    assert load_config(parse_yaml(dump_yaml(config), "text")) == config


# --- overrides ------------------------------------------------------------------------------------------------------


def test_overrides_are_parsed_as_yaml() -> None:
    assert parse_overrides(["rounds=10", "train.lr=1e-3", "name=a=b", "lora.targets=[q, v]", "train.clip="]) == {
        "rounds": 10,
        "train.lr": 0.001,
        "name": "a=b",
        "lora.targets": ["q", "v"],
        "train.clip": None,
    }


@pytest.mark.parametrize("argument", ["rounds", "=3", ""])
def test_an_override_without_a_value(argument: str) -> None:
    with pytest.raises(ConfigError, match=r"expected section\.key=value"):
        parse_overrides([argument])


def test_an_override_that_is_not_yaml() -> None:
    with pytest.raises(ConfigError, match=r"override lora\.targets: not valid YAML"):
        parse_overrides(["lora.targets=[q"])


def test_overrides_set_fields_sections_and_list_elements() -> None:
    source = SMALLEST | {"method": [{"name": "local"}, {"name": "fedalt", "lora": {"rank": 2}}]}
    config = load_config(source, {"rounds": 7, "lora": {"rank": 3}, "method.1.lora.rank": 4, "method.0": "head_only"})
    assert config.rounds == 7
    assert config.lora.rank == 3
    assert [entry.key for entry in config.method] == ["head_only", "fedalt"]
    assert config.section_for(config.method[1]).lora.rank == 4
    assert source["method"][1] == {"name": "fedalt", "lora": {"rank": 2}}  # the source is left as it was


def test_overrides_on_a_configuration_keep_the_rest() -> None:
    first = load_config(SMALLEST, {"lora.rank": 3, "name": "mine"})
    second = load_config(first, {"rounds": 9})
    assert (second.rounds, second.lora.rank, second.name) == (9, 3, "mine")
    assert first.rounds == 2


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("lora.rnk", "lora.rnk: unknown key (did you mean 'rank'?)"),
        ("lra.rank", "lra: unknown key (did you mean 'lora'?)"),
        ("rounds.x", "override rounds.x: 'x' lies inside a plain value, not a section"),
        ("rounds.x.y", "override rounds.x.y: 'x' lies inside a plain value, not a section"),
        ("method.2", "override method.2: '2' lies inside"),
        ("method.2.head", "override method.2.head: '2' is not an index below 2"),
        ("method.-1.head", "override method.-1.head: '-1' is not an index below 2"),
        ("method.first.head", "override method.first.head: 'first' is not an index below 2"),
        ("method.0.head", "override method.0.head: 'head' lies inside a plain value"),
    ],
)
def test_overrides_that_lead_nowhere(path: str, expected: str) -> None:
    assert expected in message_of(SMALLEST | {"method": ["local", "fedalt"]}, {path: 1})


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


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"reft": {"rnk": 3}}, "reft.rnk: unknown key (did you mean 'rank'?); allowed: dropout, kind, layers"),
        ({"lora": {"taregts": []}}, "lora.taregts: unknown key (did you mean 'targets'?); allowed: alpha, dropout"),
        ({"train": {"batchsize": 3}}, "train.batchsize: unknown key (did you mean 'batch_size'?); allowed: accum"),
        ({"reft": {"kind": "lorefft"}}, "reft.kind: got 'lorefft': "),
        ({"reft": {"kind": "lorefft"}}, "(did you mean 'loreft'?)"),
        ({"lora": {"rank": 0}}, "lora.rank: got 0: Input should be greater than or equal to 1"),
        ({"lora": {"rank": True}}, "lora.rank: expected a number, got true"),
        ({"train": {"lr": 0, "eps": -1}}, "train.lr: got 0: Input should be greater than 0; train.eps: got -1"),
    ],
)
def test_mistakes_in_a_method_section_name_the_method_and_the_section(section: dict[str, Any], expected: str) -> None:
    message = message_of(SMALLEST | {"method": ["local", {"name": "fedreft", "label": "mine", **section}]})
    assert message.startswith("configuration: method 'mine': ")
    assert expected in message


def test_a_tier_without_gpu_cannot_use_cuda() -> None:
    message = message_of(with_section("clients.tiers", {"phone": {"share": 1, "num_gpus": 0}}) | {"device": "cuda"})
    assert message.endswith("`cuda` needs clients.num_gpus above 0 (or left out), got 0 (tier 'phone')")


def test_every_plain_field_is_documented() -> None:
    """The texts under the fields are their documentation; a new field without one fails here."""
    pairs = [(section, name) for section in Section.__subclasses__() for name in section.model_fields]
    documented = {f"{section.__name__}.{name}" for section, name in pairs if section.model_fields[name].description}
    sections = {"checkpoint", "model", "data", "partition", "clients", "lora", "reft", "train", "evaluation"}
    expected = {
        f"{section.__name__}.{name}"
        for section, name in pairs
        if section is not MethodSections and (section is not Config or name not in sections)
    }
    assert expected - documented == set()


def test_to_mapping_holds_every_field() -> None:
    mapping = to_mapping(load_config(SMALLEST))
    assert set(mapping) == set(Config.model_fields)
    assert mapping["method"][0]["name"] == "fedreft"
    assert "class" in mapping["method"][0]
