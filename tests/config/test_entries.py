"""Sections that are entries of a registry: chosen by name or class, with the fields of one entry."""

import subprocess
import sys
from typing import Any

import pytest
from small_config import SMALLEST, message_of, with_section

from fedray.adapters.kind import AdapterKind
from fedray.aggregation.rule import Rule
from fedray.config import EngineConfig, Metric, dump_yaml, load_config, parse_yaml, to_mapping
from fedray.config.data import SOURCES
from fedray.config.partition import PARTITIONERS
from fedray.data.partitions.dirichlet import Dirichlet
from fedray.data.sources.files import Files


def test_every_module_is_an_entry_of_its_name() -> None:
    assert SOURCES.names == ("docstrings", "files", "hub", "several", "synthetic")
    expected = "by_column by_file dirichlet distinct_task iid mixed_task quantity_skew shards"
    assert PARTITIONERS.names == tuple(expected.split())


def test_a_section_has_the_fields_of_its_entry_alone() -> None:
    mapping = to_mapping(load_config(SMALLEST | {"partition": {"kind": "shards", "classes_per_client": 3}}))
    assert {"libraries", "max_per_client"} <= set(mapping["data"])
    assert not {"files", "groups", "name"} & set(mapping["data"])
    assert mapping["partition"] | {"classes_per_client": 3, "column": None} == mapping["partition"]
    assert "alpha" not in mapping["partition"]


def test_a_name_alone_and_nothing_are_enough() -> None:
    assert load_config(SMALLEST | {"data": "docstrings"}) == load_config(SMALLEST)
    assert load_config(SMALLEST).partition.kind == "iid"
    assert load_config(SMALLEST | {"partition": "by_file"}).partition.kind == "by_file"


def test_one_file_serves_all_entries() -> None:
    """Fields of other entries are left out, so that `partition.kind` alone can be changed."""
    flat = SMALLEST | {"partition": {"kind": "by_file", "alpha": 0.7, "classes_per_client": 5, "column": None}}
    assert to_mapping(load_config(flat, {"partition.kind": "dirichlet"}))["partition"]["alpha"] == 0.7
    assert to_mapping(load_config(flat, {"partition.kind": "shards"}))["partition"]["classes_per_client"] == 5


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("partition.alpha", -1, "partition.alpha: got -1: Input should be greater than 0"),
        ("data.examples_per_client", True, "data.examples_per_client: expected a number, got true"),
        ("data.files", 3, "data.files: got 3: Input should be a valid dictionary"),
    ],
)
def test_fields_of_other_entries_are_checked(path: str, value: object, expected: str) -> None:
    assert message_of(with_section(path, value)) == f"configuration: {expected}"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({}, "data.source: missing; allowed: docstrings, files, hub, several, synthetic, or give the `class`"),
        (3, "data: got 3: Input should be a valid dictionary"),
        ({"source": "files", "class": "a.B"}, "data.class: expected either `source` (built in) or `class`"),
        ({"class": "absent.B"}, "data.class: class 'absent.B' cannot be imported: ModuleNotFoundError"),
        ({"class": "os.path"}, "data.class: os.path must be a class derived from fedray.config.data.DataConfig"),
        ({"class": "fedray.config.Section"}, "data.class: fedray.config.Section must be a class derived from"),
        ({"class": "fedray.config.DataConfig"}, "data.class: fedray.config.DataConfig must have the methods of"),
    ],
)
def test_what_is_no_entry_is_refused(data: Any, expected: str) -> None:
    assert message_of(SMALLEST | {"data": data}).startswith(f"configuration: {expected}")


def test_sections_made_in_python_know_their_names() -> None:
    config = load_config(SMALLEST | {"data": Files(files={"train": "x.csv"}), "partition": Dirichlet(alpha=2)})
    assert (config.data.source, config.partition.kind) == ("files", "dirichlet")
    assert load_config(parse_yaml(dump_yaml(config), "text")) == config


def test_a_configuration_is_checked_without_the_heavy_libraries() -> None:
    code = (
        "import sys; from fedray.config import load_config\n"
        "data = {'source': 'files', 'files': {'train': 'x'}}\n"
        "partition = {'kind': 'shards', 'alpha': 1}\n"
        "load_config(dict(rounds=1, method='local', model={'path': 'x'}, data=data, partition=partition))\n"
        "print({'torch', 'transformers', 'datasets', 'ray'} & set(sys.modules))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.parametrize(
    ("base", "function"), [(AdapterKind, "attach"), (EngineConfig, "build"), (Metric, "compute"), (Rule, "everybody")]
)
def test_a_class_without_its_function_is_refused(base: Any, function: str) -> None:
    """Where it is defined, which is when a configuration names it; a class further down inherits the function."""
    own = {"__module__": __name__, "tasks": ("regression",)} if base is Metric else {"__module__": __name__}
    with pytest.raises(TypeError, match=f"Nothing: has no function `{function}`"):
        type("Nothing", (base,), own)
    something = type("Something", (base,), own | {function: lambda self, *given: None})
    assert issubclass(type("More", (something,), own), base)
