"""Names of clients: what the data calls them, on the console, in tables and in files, also when a run is continued."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny import tiny_bert

import fedray
from fedray.config import load_config
from fedray.data.client_names import unique_names
from fedray.experiment.prepare import prepare
from fedray.results.report import data_table
from fedray.storage.paths import safe_name


def test_names_stay_what_they_are_and_unique() -> None:
    assert unique_names(["a b", "a_b", "A b", "a b", "a b_2", "a b"]) == [
        "a b",
        "a_b",
        "A b",
        "a b_2",
        "a b_2_2",
        "a b_3",
    ]


NAMES = ["北京", "Москва", "all", "All", "é", "e\u0301", "../x", "[red]b[/x]", "a\nb", "a" * 300]


@pytest.fixture
def experiment(tmp_path: Path) -> dict[str, Any]:
    """Ten clients with twelve examples each; blanks around a name do not count."""
    rows = [
        {"text": f"t {i}", "label": i % 2, "who": name if i % 3 else f" {name} "} for name in NAMES for i in range(12)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "rounds": 1,
        "method": "fedalt",
        "model": tiny_bert(),
        "data": {
            "source": "files",
            "files": {"train": str(tmp_path / "train.jsonl")},
            "max_length": 16,
            "cache_dir": str(tmp_path / "cache"),
        },
        "partition": {"kind": "by_column", "column": "who"},
        "lora": {"rank": 2},
        "train": {"max_steps": 1},
        "device": "cpu",
        "runtime": "inline",
    }


def test_an_experiment_keeps_the_names_of_its_clients(experiment: dict[str, Any], tmp_path: Path) -> None:
    """In tables, in files that no other client overwrites, and when it is continued for a second round."""
    fedray.run(experiment, output=tmp_path / "run")
    found = fedray.run(experiment | {"rounds": 2}, resume=tmp_path / "run")
    for _, clients in found.clients().groupby(["phase", "server_round"]):
        assert sorted(clients.client) == sorted(NAMES)
    for folder in ("clients", "states"):
        files = sorted((tmp_path / "run" / "adapters" / "fedalt" / folder).iterdir())
        assert files == sorted(files[0].with_name(f"{safe_name(name)}.safetensors") for name in NAMES)
        contents = {file.read_bytes() for file in files}
        assert len(contents) == len(NAMES), "each client has an adapter of its own"


def test_the_console_shows_names_as_they_are(experiment: dict[str, Any]) -> None:
    prepared = prepare(load_config(experiment))
    console = Console(width=400, record=True)
    console.print(data_table(prepared.clients, prepared.data))
    lines = console.export_text()
    assert all(f" {' '.join(name.split())} " in lines for name in NAMES)
