"""Several sources in one experiment: each part is a task, with columns, templates and limits of its own."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from partitioning import assign
from small_config import message_of
from typer.testing import CliRunner

from fedray.cli.app import app
from fedray.config import Config, dump_yaml, load_config, parse_overrides, parse_yaml, to_mapping
from fedray.config.data import SOURCES
from fedray.data.checks import data_notes
from fedray.data.examples import Examples, assemble
from fedray.data.formats.instructions import find_instructions
from fedray.data.load import load_federated_data
from fedray.data.partition import partition
from fedray.data.sources.files import Files
from fedray.data.sources.several import Several
from fedray.data.subsample import subsample
from fedray.errors import ConfigError, DataError
from fedray.models.tokenizer import byte_tokenizer
from fedray.types import Task

CARD = """---
configs:
- config_name: sums
  data_files:
  - {split: train, path: sums.jsonl}
  - {split: validation, path: sums_validation.jsonl}
- config_name: pairs
  data_files:
  - {split: train, path: pairs.jsonl}
  - {split: matched, path: matched.jsonl}
  - {split: mismatched, path: mismatched.jsonl}
---
Two configurations with columns of their own.
"""
SIZES = {"sums": 40, "sums_validation": 10, "pairs": 30, "matched": 8, "mismatched": 6}


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset with two configurations, as the hub has it."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "README.md").write_text(CARD)
    for name, count in SIZES.items():
        first, second, label = ("question", "hint", "total") if "sums" in name else ("premise", "hypothesis", "gold")
        rows = [{first: f"{name} {i}", second: f"h{i}", label: f"{'even' if i % 2 else 'odd'}"} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return folder


def parts(folder: Path, **changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return two parts of one dataset, with templates of their own."""
    hub = {"source": "hub", "name": str(folder)}
    sums = {"config": "sums", "splits": {"train": "train[:75%]", "test": "validation"}, "prompt": "Q: {question}\n"}
    pairs = {
        "config": "pairs",
        "splits": {"train": "train", "test": {"m": "matched", "mm": "mismatched"}},
        "prompt": "{premise} / {hypothesis}",
    }
    found = {"sums": hub | sums | {"answer": "{total}"}, "pairs": hub | pairs | {"answer": "{gold}"}}
    return {name: part | changes.get(name, {}) for name, part in found.items()}


def several(given: dict[str, Any], **fields: Any) -> Several:
    section = SOURCES.parse({"source": "several", "parts": given} | fields)
    assert isinstance(section, Several)
    return section


def load(data: Several, task: Task = "causal_lm") -> Examples:
    raw = list(data.load(task, 0, None))
    return assemble(raw, data, task, find_instructions(raw, data, False) if task == "causal_lm" else None)


def sizes(examples: Examples) -> Counter[tuple[str, str]]:
    return Counter(zip(examples.field("task").tolist(), examples.field("split").tolist(), strict=True))


def test_each_part_is_a_task_and_a_client_with_a_template_of_its_own(hub_folder: Path) -> None:
    examples = load(several(parts(hub_folder)))
    assert sizes(examples) == {
        ("sums", "train"): 30,
        ("sums", "test"): 10,
        ("pairs", "train"): 30,
        ("pairs", "test"): 14,
    }
    assert examples.table["prompt"].to_pylist()[0] == "Q: sums 0\n"
    assert examples.table["prompt"].to_pylist()[-1] == "mismatched 5 / h5"
    assert set(zip(examples.field("task"), examples.field("file"), strict=True)) == {
        ("sums", "sums"),
        ("pairs", "pairs"),
    }
    assert Counter(examples.groups[examples.field("split") == "test"]) == {"sums": 10, "pairs/m": 8, "pairs/mm": 6}
    assert examples.place(0) == f"sums: {hub_folder}, split train: row 1"
    for kind in ("by_file", "distinct_task"):
        clients = assign(examples, kind, None, validation_fraction=0)
        found = {name: [len(splits[split]) for split in ("train", "test")] for name, splits in clients.items()}
        assert found == {"pairs": [30, 14], "sums": [30, 10]}


def test_classes_are_those_of_all_parts(hub_folder: Path) -> None:
    """Columns differ by part; a class of one name is one class."""
    columns = {
        "sums": {"text": "question", "label": "total"},
        "pairs": {"text": "premise", "label": "gold"},
    }
    examples = load(several(parts(hub_folder, **columns)), "classification")
    assert examples.label_names == ("even", "odd")
    assert examples.table["text"].to_pylist()[:1] + examples.table["text"].to_pylist()[-1:] == [
        "sums 0",
        "mismatched 5",
    ]
    assert set(assign(examples, "dirichlet", 3, alpha=1.0)) == {f"client_{k:03d}" for k in range(3)}
    pair = {"text_pair": "hypothesis", "text": "premise", "label": "gold"}
    with pytest.raises(DataError, match=r"pairs: .*: pairs of texts .text_pair., but sums: .* has single texts"):
        load(several(parts(hub_folder, sums=columns["sums"], pairs=pair)), "classification")


def test_limits_are_each_part_s_own_and_then_those_of_all(hub_folder: Path) -> None:
    limits = {"sums": {"max_examples": 12, "max_test_examples": 3}, "pairs": {"max_per_class": 4, "label": "gold"}}
    data = several(parts(hub_folder, **limits))
    kept = subsample(load(data), data, 0)
    assert sizes(kept) == {("sums", "train"): 12, ("sums", "test"): 3, ("pairs", "train"): 8, ("pairs", "test"): 14}
    of_pairs = kept.take(np.flatnonzero((kept.field("task") == "pairs") & (kept.field("split") == "train")))
    assert Counter(of_pairs.field("answer")) == {"even": 4, "odd": 4}
    assert subsample(load(data), data, 0).table == kept.table
    assert subsample(load(data), data, 1).table != kept.table
    together = several(parts(hub_folder, **limits), max_examples=9)
    fewer = subsample(load(together), together, 0)
    assert (fewer.field("split") == "train").sum() == 9
    assert set(fewer.field("prompt")) < set(kept.field("prompt"))
    wrong = several(parts(hub_folder, sums={"max_per_class": 2, "label": "sort"}))
    with pytest.raises(
        DataError, match=r"^data\.parts\.sums\.max_per_class: there are no classes.*data\.parts\.sums\.label 'sort'"
    ):
        subsample(load(wrong), wrong, 0)


def test_one_part_is_what_the_source_alone_is(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"t": f"text {i}", "l": i % 3}) + "\n" for i in range(30)))
    alone = Files.model_validate({"files": {"train": str(tmp_path / "x.jsonl")}, "text": "t", "label": "l"})
    part = several({"x": {"source": "files", "files": {"train": str(tmp_path / "x.jsonl")}, "text": "t", "label": "l"}})
    expected = assemble(list(alone.load("classification", 0, None)), alone, "classification")
    found = load(part, "classification")
    assert found.table == expected.table
    assert found.columns == expected.columns
    assert found.label_column == expected.label_column == "l"


def test_natural_clients_of_a_part_keep_their_names_behind_its_own(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "t", "label": 1}\n{"text": "u", "label": 2}\n')
    many = {"source": "files", "files": {"train": str(tmp_path / "*.jsonl")}}
    one = {"source": "files", "files": {"train": str(tmp_path / "a.jsonl"), "test": str(tmp_path / "b.jsonl")}}
    found = load(several({"many": many, "one": one}), "classification")
    assert sorted(set(found.field("file"))) == ["many/a", "many/b", "many/c", "one"]


def test_what_a_part_leaves_out_is_taken_from_outside(hub_folder: Path, tmp_path: Path) -> None:
    given = parts(hub_folder)
    for part in given.values():
        del part["answer"]
    data = several(given, answer="!", prompt="unused", text="question")
    assert set(load(data).field("answer")) == {"!"}
    assert load(data).field("prompt")[0] == "Q: sums 0\n"
    sections = data.sections_by_path
    assert [section.text for section in sections.values()] == ["question"] * 2
    formatted = several({"a": {"source": "docstrings", "format": "alpaca"}, "b": {"source": "docstrings"}}, prompt="p")
    found = formatted.sections_by_path
    assert [(found[f"data.parts.{name}"].format, found[f"data.parts.{name}"].prompt) for name in "ab"] == [
        ("alpaca", "{prompt}"),
        (None, "p"),
    ]
    other = several({"a": {"source": "docstrings", "prompt": "q"}, "b": {"source": "docstrings"}}, format="alpaca")
    assert [section.format for section in other.sections_by_path.values()] == [None, "alpaca"]


def experiment(data: dict[str, Any], **sections: Any) -> dict[str, Any]:
    return {
        "rounds": 1,
        "method": "fedavg",
        "task": "causal_lm",
        "model": {
            "path": "random",
            "tokenizer": "bytes",
            "config": {
                "model_type": "llama",
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 16,
            },
        },
        "data": {"source": "several"} | data,
        "partition": {"kind": "distinct_task", "min_examples": 2},
        "runtime": "inline",
    } | sections


def test_a_configuration_is_read_back_and_changed(
    hub_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What parts take from outside is not written into them, so that it can be changed in one place."""
    monkeypatch.chdir(tmp_path)
    given = parts(Path("tasks"), pairs={"max_examples": 7})
    del given["pairs"]["prompt"]
    config = load_config(experiment({"parts": given, "prompt": "{premise}"}))
    absolute = config.with_absolute_paths(Path.cwd())
    assert absolute.data.sections_by_path["data.parts.sums"].name == str(tmp_path / "tasks")  # type: ignore[attr-defined]
    for found in (config, absolute):
        again = load_config(parse_yaml(dump_yaml(found), "file"))
        assert again == found
        assert again.data.sections_by_path == found.data.sections_by_path
        changed = load_config(found, {"data.prompt": "new", "data.max_length": 99, "data.parts.pairs.max_examples": 5})
        pairs = changed.data.sections_by_path["data.parts.pairs"]
        assert (pairs.prompt, pairs.max_length, pairs.max_examples) == ("new", 99, 5)
        assert changed.data.sections_by_path["data.parts.sums"].prompt == "Q: {question}\n"
    assert "max_length" not in to_mapping(config)["data"]["parts"]["sums"]
    words = load_config(config, parse_overrides(["data.parts.sums.prompt={total}?", "data.parts.sums.max_examples=3"]))
    assert words.data.sections_by_path["data.parts.sums"].prompt == "{total}?"
    assert words.data.sections_by_path["data.parts.sums"].max_examples == 3


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({}, "data.parts: the source `several` needs at least one part"),
        ({"parts": {"a": {"source": "hbu"}}}, "data.parts.a.source: unknown data source 'hbu' (did you mean 'hub'?)"),
        ({"parts": {"a": {}}}, "data.parts.a.source: missing; allowed: docstrings, files, hub, several, synthetic"),
        ({"parts": {"a": {"source": "hub"}}}, "data.parts.a.name: the source `hub` needs the name of a dataset"),
        (
            {"parts": {"a": {"source": "docstrings", "promt": "x"}}},
            "data.parts.a.promt: unknown key (did you mean 'prompt'",
        ),
        ({"parts": {"a": {"source": "docstrings", "max_examples": 0}}}, "data.parts.a.max_examples: got 0: "),
        (
            {"parts": {"a": {"source": "docstrings", "max_length": 64}}},
            "data.parts.a.max_length: all parts have the same; set data.max_length",
        ),
        (
            {"parts": {"a": {"source": "several", "parts": {"b": "docstrings"}}}},
            "data.parts.a.source: a part has no parts of its own",
        ),
        ({"parts": {" a": "docstrings"}}, "data.parts. a: a part needs a name, without blanks around it"),
        (
            {"parts": {"a": {"source": "docstrings", "format": "alpaca", "prompt": "x"}}},
            "data.parts.a.format: 'alpaca' has columns of its own; leave out either format, or prompt",
        ),
    ],
)
def test_mistakes_in_a_part_are_located(data: dict[str, Any], expected: str) -> None:
    lines = message_of(experiment(data)).splitlines()
    assert lines[0].startswith(f"configuration: {expected}"), lines


def test_a_format_is_for_causal_lm_also_in_a_part() -> None:
    data = {"parts": {"a": {"source": "docstrings", "format": "alpaca"}}}
    assert "data.parts.a.format: only for task causal_lm" in message_of(experiment(data, task="classification"))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            {"splits": {"train": "trian"}},
            r"^data\.parts\.sums\.splits\.train: .* has no split 'trian' .did you mean 'tra",
        ),
        ({"name": "nowhere/at-all-here"}, r"^data\.parts\.sums\.name: the dataset 'nowhere/at-all-here' could not be"),
        ({"prompt": "{question?!}"}, r"data\.parts\.sums\.prompt"),
        ({"prompt": "{qestion}"}, r"^sums: .*, split train: no column 'qestion' .data\.parts\.sums\.prompt. .did you"),
        (
            {"format": "alpaca", "prompt": "{prompt}", "answer": "{answer}"},
            r"data\.parts\.sums\.format 'alpaca' reads the",
        ),
    ],
)
def test_mistakes_about_the_rows_of_a_part_are_located(
    hub_folder: Path, part: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=message):
        load(several(parts(hub_folder, sums=part)))


def test_messages_of_files_and_of_sources_without_fields_are_located(tmp_path: Path) -> None:
    absent = {"source": "files", "files": {"train": str(tmp_path / "x.jsonl")}}
    with pytest.raises(DataError, match=r"^data\.parts\.a\.files\.train: no such file: .*x\.jsonl"):
        load(several({"a": absent}))
    (tmp_path / "x.jsonl").write_text("{oops")
    with pytest.raises(DataError, match=r"^data\.parts\.a: .*x\.jsonl: line 1: not valid JSON"):
        load(several({"a": absent}))


def test_formats_are_detected_part_by_part(tmp_path: Path) -> None:
    """Conversations in two formats are one form; conversations beside texts are refused."""
    rows = {
        "chat": {
            "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}],
            "tools": "x",
        },
        "old": {"instruction": "Say no.", "output": "No"},
        "text": {"prompt": "a", "answer": "b"},
    }
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    given = {name: {"source": "files", "files": {"train": str(tmp_path / f"{name}.jsonl")}} for name in rows}
    data = several({name: given[name] for name in ("chat", "old")})
    raw = list(data.load("causal_lm", 0, None))
    found = find_instructions(raw, data, True)
    assert {path: layout.name for path, layout in found.items()} == {
        "data.parts.chat": "messages",
        "data.parts.old": "alpaca",
    }
    assert assemble(raw, data, "causal_lm", found).conversations
    assert (
        found["data.parts.chat"]
        .notes(["messages", "tools"])[1]
        .startswith("data.parts.chat.format 'messages' does not")
    )
    assert (
        found["data.parts.old"].notes([])[0].startswith("data.parts.old: instruction data in the format 'alpaca', det")
    )
    mixed = several({name: given[name] for name in ("chat", "text")})
    raw = list(mixed.load("causal_lm", 0, None))
    with pytest.raises(
        DataError, match="text: .*: prompts and answers as texts, but chat: .* has conversations; an exp"
    ):
        assemble(raw, mixed, "causal_lm", find_instructions(raw, mixed, True))


def test_notes_name_the_part(hub_folder: Path) -> None:
    """Part `pairs` has no column `question`, although another part has."""
    data = several(parts(hub_folder, pairs={"prompt": "{question?}{premise}"}))
    examples = load(data)
    config = load_config(experiment({"parts": {"a": "docstrings"}})).partition
    notes = data_notes(examples, examples, partition(examples, config, None, 0), np.arange(0), data)
    assert any(note.startswith("data.parts.pairs.prompt: no file has the column 'question'") for note in notes)
    labels = {"sums": {"text": "hint", "label": "question"}, "pairs": {"text": "premise", "label": "gold"}}
    data = several(parts(hub_folder, **{name: part | {"splits": {"train": "train"}} for name, part in labels.items()}))
    examples = load(data, "classification")
    notes = data_notes(examples, examples, partition(examples, config, None, 0), np.arange(0), data)
    assert any(
        note.startswith("data.parts.sums.label: the column 'question' has 40 classes in 40 tr") for note in notes
    )
    assert not any("data.parts.pairs.label" in note for note in notes)


def test_validate_shows_clients_and_parts(hub_folder: Path, tmp_path: Path) -> None:
    data = {"parts": parts(hub_folder, sums={"max_examples": 20}), "cache_dir": str(tmp_path / "cache")}
    (tmp_path / "x.yaml").write_text(json.dumps(experiment(data)))
    ended = CliRunner().invoke(app, ["validate", str(tmp_path / "x.yaml")])
    assert ended.exit_code == 0, ended.output
    table = ended.output.partition("2 parts")[2].splitlines()
    assert [row.split() for row in table[4:6]] == [["pairs", "25", "5", "14", "0"], ["sums", "17", "3", "10", "0"]]


def test_parts_are_counted_as_the_clients_hold_them(hub_folder: Path, configure: Callable[..., Config]) -> None:
    sections: dict[str, Any] = {"task": "causal_lm", "clients": {"count": 1}}
    one = configure({"source": "several", "parts": parts(hub_folder)}, {"kind": "distinct_task"}, **sections)
    found = load_federated_data(one, byte_tokenizer())
    assert {name: sum(counts.values()) for name, counts in found.parts.items()} == {"pairs": 44, "sums": 0}
    alone = configure({"source": "synthetic"}, **sections)
    assert load_federated_data(alone, byte_tokenizer()).parts == {}
    with pytest.raises(ConfigError, match="partition"):
        configure({"source": "several", "parts": parts(hub_folder)}, {"kind": "distinct"}, **sections)
