"""The kits of published experiments are valid: their commands, on a few rows with the columns and splits of the data."""

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest
from typer.testing import CliRunner

from fedray.cli.app import app
from fedray.config import load_config, load_sweep

PAPERS = Path(__file__).parents[2] / "jobs" / "papers"
KITS = sorted(path.name for path in PAPERS.glob("k[1-9]*.yaml"))
ROWS = 120

SMALL: dict[str, dict[str, Any]] = {
    "FacebookAI/roberta-large": {"model_type": "roberta", "max_position_embeddings": 600},
    "google-bert/bert-base-uncased": {"model_type": "bert"},
    "google-bert/bert-large-uncased": {"model_type": "bert"},
    "bigscience/bloom-560m": {"model_type": "bloom", "n_layer": 2, "n_head": 2},
    "mistralai/Mistral-7B-v0.3": {"model_type": "mistral", "num_key_value_heads": 2},
}
"""Random models of a published model's family, by its id on the hub; all others are Llama."""
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}

Columns = Mapping[str, Any]
PAIRS = ("no", "yes")
GLUE: dict[str, tuple[Columns, tuple[str, ...], tuple[str, ...]]] = {
    "cola": ({"sentence": "text"}, ("unacceptable", "acceptable"), ("train", "validation", "test")),
    "sst2": ({"sentence": "text"}, ("negative", "positive"), ("train", "validation", "test")),
    "mrpc": (
        {"sentence1": "text", "sentence2": "text"},
        ("not_equivalent", "equivalent"),
        ("train", "validation", "test"),
    ),
    "qqp": (
        {"question1": "text", "question2": "text"},
        ("not_duplicate", "duplicate"),
        ("train", "validation", "test"),
    ),
    "mnli": (
        {"premise": "text", "hypothesis": "text"},
        ("entailment", "neutral", "contradiction"),
        ("train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched"),
    ),
    "qnli": (
        {"question": "text", "sentence": "text"},
        ("entailment", "not_entailment"),
        ("train", "validation", "test"),
    ),
    "rte": (
        {"sentence1": "text", "sentence2": "text"},
        ("entailment", "not_entailment"),
        ("train", "validation", "test"),
    ),
    "wnli": (
        {"sentence1": "text", "sentence2": "text"},
        ("not_entailment", "entailment"),
        ("train", "validation", "test"),
    ),
}
"""Text columns, classes and splits of the configurations of nyu-mll/glue."""


def write_hub(folder: Path) -> None:
    """Write the datasets of the hub that kits name, as local folders of the same names."""
    configs = {
        name: ({**columns, "label": classes, "idx": "int32"}, splits)
        for name, (columns, classes, splits) in GLUE.items()
    }
    write_dataset(folder / "nyu-mll" / "glue", configs)


def write_dataset(folder: Path, configs: Mapping[str, tuple[Columns, tuple[str, ...]]]) -> None:
    """Write a dataset in the layout of the hub: a card, and a parquet file per configuration and split."""
    card = ["---", "configs:"]
    for config, (columns, splits) in configs.items():
        card += [f"- config_name: {config}", "  data_files:"]
        for split in splits:
            path = folder / config / f"{split}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = {name: values(kind, name, split) for name, kind in columns.items()}
            kinds = {name: feature(kind) for name, kind in columns.items()}
            datasets.Dataset.from_dict(rows, datasets.Features(kinds)).to_parquet(str(path))
            card += [f"  - split: {split}", f"    path: {config}/{split}.parquet"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))


def feature(kind: Any) -> Any:
    """Return the type of a column: classes, numbers, or texts."""
    if isinstance(kind, tuple):
        return datasets.ClassLabel(names=list(kind))
    return datasets.Value("int32" if kind == "int32" else "string")


def values(kind: Any, name: str, split: str) -> list[Any]:
    """Return a column: classes in turn (-1 in GLUE's hidden test splits), numbers, or texts."""
    if isinstance(kind, tuple):
        return [-1] * ROWS if split.startswith("test_") or split == "test" else [i % len(kind) for i in range(ROWS)]
    if kind == "int32":
        return list(range(ROWS))
    if kind == "text":
        return [f"{name} {split} {i}" for i in range(ROWS)]
    return [str(kind).format(i=i) for i in range(ROWS)]


def commands(kit: str) -> list[list[str]]:
    """Return the overrides of every command that the kit's header names."""
    text = (PAPERS / kit).read_text("utf-8")
    found = re.findall(r"^#   fedray (?:run|validate|sweep) (\S+)(.*)$", text, re.MULTILINE)
    assert found
    assert {path for path, _ in found} == {f"jobs/papers/{kit}"}
    return [overrides for overrides in dict.fromkeys(tuple(shlex.split(rest)) for _, rest in found)]


CASES = [pytest.param(kit, rest, id=" ".join([kit, *rest])) for kit in KITS for rest in commands(kit)]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the data that kits name is where they look for it."""
    folder = tmp_path_factory.mktemp("papers") / "checkout"
    write_hub(folder)
    (folder / "jobs").mkdir()
    (folder / "jobs" / "papers").symlink_to(PAPERS)
    return folder


@pytest.mark.parametrize(("kit", "overrides"), CASES)
def test_a_kit_is_valid(kit: str, overrides: list[str], checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", checkout.parent / "cache")
    path = f"jobs/papers/{kit}"
    model = load_config(path, dict(override.split("=", 1) for override in overrides)).model
    family = {"model_type": "llama", "num_key_value_heads": 2} | SMALL.get(model.path, {})
    if family["model_type"] != "llama":
        family.pop("num_key_value_heads", None) if family["model_type"] != "mistral" else None
    small = [
        "model.path=random",
        "model.tokenizer=bytes",
        f"model.config={json.dumps(SIZES | family)}",
        f"data.cache_dir={checkout.parent / 'tokens'}",
    ]
    ended = CliRunner().invoke(app, ["validate", path, *overrides, *small])
    assert ended.exit_code == 0, ended.output
    assert "the experiment is valid" in ended.output
