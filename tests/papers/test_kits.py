"""The kits of published experiments are valid: every command of their headers, on a few rows of data of that form."""

import json
import re
import shlex
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import datasets
import pytest
from typer.testing import CliRunner

from fedray.cli.app import app
from fedray.config import Config, load_config, parse_overrides

PAPERS = Path(__file__).parents[2] / "jobs" / "papers"
KITS = sorted(path.name for path in PAPERS.glob("k[1-9]*.yaml") if not path.stem.endswith("twin"))
ROWS, CLIENTS = 400, 40

WIDTH, DEPTH, HEADS = 128, 2, 2
BLOCKS = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "intermediate_size": WIDTH}
LLAMA: dict[str, Any] = {"model_type": "llama", "num_key_value_heads": HEADS} | BLOCKS
SMALL: dict[str, dict[str, Any]] = {
    "FacebookAI/roberta-large": {"model_type": "roberta", "max_position_embeddings": 600} | BLOCKS,
    "google-bert/bert-base-uncased": {"model_type": "bert"} | BLOCKS,
    "google-bert/bert-large-uncased": {"model_type": "bert"} | BLOCKS,
    "bigscience/bloom-560m": {"model_type": "bloom", "hidden_size": WIDTH, "n_layer": DEPTH, "n_head": HEADS},
    "mistralai/Mistral-7B-v0.3": LLAMA | {"model_type": "mistral"},
}
"""Random models of a published model's family, by its id on the hub; all others are Llama."""

Columns = Mapping[str, Any]
INSTRUCTIONS = {"instruction": "text", "input": "text", "output": "text"}
HUB: tuple[tuple[str, tuple[str, ...], Columns], ...] = (
    ("FinGPT/fingpt-sentiment-train", ("train",), INSTRUCTIONS),
    ("lucasmccabe-lmi/CodeAlpaca-20k", ("train",), INSTRUCTIONS),
    ("vicgalle/alpaca-gpt4", ("train",), INSTRUCTIONS | {"text": "text"}),
    ("flwrlabs/alpaca-gpt4", ("train",), INSTRUCTIONS | {"text": "text"}),
    ("flwrlabs/code-alpaca-20k", ("train",), INSTRUCTIONS),
    ("flwrlabs/fingpt-sentiment-train", ("train",), INSTRUCTIONS),
    ("flwrlabs/medical-meadow-medical-flashcards", ("train",), INSTRUCTIONS),
    ("fancyzhx/ag_news", ("train", "test"), {"text": "text", "label": ("World", "Sports", "Business", "Sci/Tech")}),
)
"""Datasets of the hub with one configuration: names, splits, and columns: classes, `text`, `int32` or a text itself."""
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


BOOLQ = {"instruction": "Question {i}?", "input": "", "answer": "true"}
FILES: dict[str, dict[str, Any]] = {
    "../LLM-Adapters/*/commonsense_170k.json": BOOLQ | {"output": "the correct answer is true"},
    "../LLM-Adapters/*/math_10k.json": {
        "instruction": "{i} + 1?",
        "input": "",
        "output": "It is {i}.",
        "answer": "{i}",
    },
    "../LLM-Adapters/*/test.json": BOOLQ | {"output": "the correct answer is true"},
    "../math*": {"instruction": "{i} + {n}?", "output": "{i}"},
    "../FedLLM-Bench/wildchat_turns.json": {
        "conversations": [{"from": "human", "value": "Question {i}?"}, {"from": "gpt", "value": "answer {i}"}]
    },
    "../FedLLM-Bench/*": {"instruction": "Question {i}?", "response": "answer {i}"},
    "../ni/*": {"instruction": "Double it.", "input": "{i}", "output": "{i}{i}"},
    "../dolly/*": {"instruction": "Question {i}?", "input": "", "output": "answer {i}", "category": "{n}"},
    "../flan8/*": {"instruction": "Question {i} {n}?", "output": "answer {i}"},
    "../FedDPA/*": {
        "instruction": "Question {i} {n}?",
        "output": "answer {i}",
        "task": "task {n}",
        "category": "{n}",
    },
}
"""Columns of the files of kits, by pattern: i is the number of a row, n of a file (0 or 1)."""

BY_CLIENT = ("../FedLLM-Bench/*", "../ni/train.json")
"""Files that are one object {client: rows}."""


def write_hub(folder: Path) -> None:
    """Write the datasets of the hub that kits name, as local folders of the same names."""
    configs = {
        name: ({**columns, "label": classes, "idx": "int32"}, splits)
        for name, (columns, classes, splits) in GLUE.items()
    }
    write_dataset(folder / "nyu-mll" / "glue", configs)
    write_dataset(folder / "openai/gsm8k", {"main": ({"question": "text", "answer": "So #### {i}"}, ("train", "test"))})
    for name, splits, columns in HUB:
        write_dataset(folder / name, {"default": (columns, splits)})


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


def write_files(config: Config) -> None:
    """Write the files that a configuration names, with the columns of `FILES`; a pattern stands for two files."""
    for name in texts_in(getattr(config.data, "files", {})):
        columns = next(columns for pattern, columns in FILES.items() if fnmatch(name, pattern))
        for number in (0, 1) if "*" in name else (0,):
            path = Path(name.replace("*", str(number)))
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                rows = [filled(columns, i, number if "*" in name else i % 2) for i in range(ROWS)]
                if any(fnmatch(name, pattern) for pattern in BY_CLIENT):
                    path.write_text(json.dumps({f"client {k}": rows[k::CLIENTS] for k in range(CLIENTS)}))
                elif path.suffix == ".jsonl":
                    path.write_text("\n".join(map(json.dumps, rows)))
                else:
                    path.write_text(json.dumps(rows))


def filled(template: Any, i: int, n: int) -> Any:
    """Return a template of a row with its numbers filled in."""
    if isinstance(template, str):
        return template.format(i=i, n=n)
    if isinstance(template, Mapping):
        return {key: filled(entry, i, n) for key, entry in template.items()}
    return [filled(entry, i, n) for entry in template]


def texts_in(value: Any) -> list[str]:
    """Return the texts of a nested mapping."""
    if isinstance(value, str):
        return [value]
    return [text for entry in value.values() for text in texts_in(entry)] if isinstance(value, Mapping) else []


def feature(kind: Any) -> Any:
    """Return the type of a column: classes, numbers, or texts."""
    if isinstance(kind, tuple):
        return datasets.ClassLabel(names=list(kind))
    return datasets.Value("int32" if kind == "int32" else "string")


def values(kind: Any, name: str, split: str) -> list[Any]:
    """Return a column: classes in turn, numbers, or texts."""
    if isinstance(kind, tuple):
        return [i % len(kind) for i in range(ROWS)]
    if kind == "int32":
        return list(range(ROWS))
    if kind == "text":
        return [f"{name} {split} {i}" for i in range(ROWS)]
    return [str(kind).format(i=i) for i in range(ROWS)]


def commands(kit: str) -> list[tuple[str, ...]]:
    """Return the overrides of every command that the kit's header names."""
    text = (PAPERS / kit).read_text("utf-8")
    found = re.findall(r"^#   fedray (?:run|validate|sweep) (\S+)(.*)$", text, re.MULTILINE)
    assert found
    assert {path for path, _ in found} == {f"jobs/papers/{kit}"}
    return list(dict.fromkeys(tuple(shlex.split(rest)) for _, rest in found))


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
def test_a_kit_is_valid(kit: str, overrides: tuple[str, ...], checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", checkout.parent / "cache")
    path = f"jobs/papers/{kit}"
    config = load_config(path, parse_overrides(list(overrides)))
    write_files(config)
    small = [
        "model.path=random",
        "model.tokenizer=bytes",
        f"model.config={json.dumps(SMALL.get(config.model.path, LLAMA))}",
        f"data.cache_dir={checkout.parent / 'tokens'}",
    ]
    ended = CliRunner().invoke(app, ["validate", path, *overrides, *small])
    assert ended.exit_code == 0, ended.output
    assert "the experiment is valid" in ended.output
