"""How configurations are read: YAML files, and overrides as text and as values."""

from pathlib import Path

import pytest
import yaml
from small_config import SMALLEST, message_of

from fedray.config import load_config, parse_overrides, parse_yaml
from fedray.errors import ConfigError


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


# --- overrides ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", ["rounds", "=3", ""])
def test_an_override_without_a_value(argument: str) -> None:
    with pytest.raises(ConfigError, match=r"expected section\.key=value"):
        parse_overrides([argument])


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
