"""Options of multiple-choice data: which texts and which tokens they are, what is learned, and what is refused."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fedray.config import Config, RawRows
from fedray.config.data import SOURCES
from fedray.data.batches import lengths
from fedray.data.examples import Examples, assemble
from fedray.data.load import load_federated_data
from fedray.data.shards import CHOICES
from fedray.data.sources.files import Files
from fedray.data.tokens.causal import CausalEncoder
from fedray.errors import DataError
from fedray.evaluation.options import options_of
from fedray.models.tokenizer import load_tokenizer

Configure = Callable[..., Config]
QUESTION = "Question: {question}\nAnswer:"


def read(columns: dict[str, Sequence[Any]], **fields: Any) -> Examples:
    data = Files.model_validate({"files": {"train": "-"}, "prompt": QUESTION, "answer": " {answer}", **fields})
    size = len(next(iter(columns.values())))
    return assemble([RawRows("quiz", {"question": ["Why?"] * size, **columns})], data, "causal_lm")


def seen(examples: Examples) -> list[tuple[str, list[str], int]]:
    table = examples.table
    return list(zip(*(table[name].to_pylist() for name in ("answer", "choices", "right")), strict=True))


@pytest.mark.parametrize("as_json", [False, True])
def test_a_column_of_texts(as_json: bool) -> None:
    """The options get the blank with which the answer begins."""
    options = [["Rome", " Paris "], ["one", "two", "three"]]
    column = [json.dumps(own) for own in options] if as_json else options
    examples = read({"options": column, "answer": ["Paris", "one"]}, choices="options")
    assert seen(examples) == [(" Paris", [" Rome", " Paris"], 1), (" one", [" one", " two", " three"], 0)]


def test_labels_name_the_option_that_is_learned() -> None:
    """As ARC has it; a label may be the text of another option."""
    options = [{"text": ["2", "1"], "label": ["1", "2"]}, {"text": ["sun", "moon", "sea"], "label": ["A", "B", "C"]}]
    examples = read({"options": options, "answer": ["1", "C"]}, choices="options")
    assert seen(examples) == [(" 2", [" 2", " 1"], 0), (" sea", [" sun", " moon", " sea"], 2)]


def test_labels_of_the_configuration() -> None:
    """HellaSwag counts from 0, MMLU has letters, WinoGrande counts columns from 1, BoolQ has booleans."""
    options = {"options": [["a", "b", "c"], ["d", "e"]]}
    expected = [(" b", [" a", " b", " c"], 1), (" d", [" d", " e"], 0)]
    assert seen(read(options | {"answer": ["1", 0]}, choices="options", choice_labels=[0, 1, 2])) == expected
    assert seen(read(options | {"answer": ["B", "A"]}, choices="options", choice_labels=["A", "B", "C"])) == expected
    columns = {"x": ["a", None], "y": ["b", "d"], "z": ["c", "e"], "answer": [2, 2]}
    examples = read(columns, choices=["{x}", "{y}", "{z}"], choice_labels=[1, 2, 3])
    assert seen(examples) == [expected[0], expected[1]]
    examples = read({"answer": [True, False]}, choices=["no", "yes"], choice_labels=[False, True])
    assert seen(examples) == [(" yes", [" no", " yes"], 1), (" no", [" no", " yes"], 0)]
    with pytest.raises(DataError, match=r"quiz: row 1: data\.choice_labels: 2 for 3 options"):
        read(options | {"answer": ["1", "0"]}, choices="options", choice_labels=[0, 1])
    with pytest.raises(DataError, match="the answer '1' must be one of the labels of options.*'0', 'B'"):
        read({"options": [["a", "b"]], "answer": ["1"]}, choices="options", choice_labels=[0, "B"])


@pytest.mark.parametrize("kind", ["parquet", "hub"])
def test_options_as_public_data_sets_have_them(tmp_path: Path, kind: str) -> None:
    """ARC: a structure of two lists."""
    import datasets

    options = [{"text": ["sun", "moon"], "label": ["A", "B"]}, {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}]
    rows = datasets.Dataset.from_dict({"question": ["Q", "R"], "choices": options, "answerKey": ["B", "3"]})
    if kind == "parquet":
        rows.to_parquet(tmp_path / "arc.parquet")
        where = {"source": "files", "files": {"train": str(tmp_path / "arc.parquet")}}
    else:
        rows.save_to_disk(tmp_path / "arc")
        where = {"source": "hub", "name": str(tmp_path / "arc")}
    data = SOURCES.parse(where | {"prompt": QUESTION, "answer": " {answerKey}", "choices": "choices"})
    examples = assemble(list(data.load("causal_lm", 0, None)), data, "causal_lm")
    assert seen(examples) == [(" moon", [" sun", " moon"], 1), (" z", [" x", " y", " z"], 2)]


def test_templates_that_are_empty_in_a_row_are_no_options() -> None:
    columns = {"a": ["x", "x"], "b": ["y", "y"], "c": ["z", None], "answer": ["y", "x"]}
    examples = read(columns, choices=["{a}", "{b}", "{c?}"])
    assert seen(examples) == [(" y", [" x", " y", " z"], 1), (" x", [" x", " y"], 0)]


def test_an_optional_field_that_no_file_has_is_noted(tmp_path: Path, configure: Configure) -> None:
    config = configure(quiz(tmp_path) | {"choices": ["yes", "no", "{other?}"]}, **RANKED)
    (note,) = (note for note in load_federated_data(config, load_tokenizer(config.model)).notes if "other" in note)
    assert note.startswith("data.choices.2: no file has the column 'other'")


def test_half_a_surrogate_pair_is_no_text() -> None:
    with pytest.raises(DataError, match="quiz: row 2: not a Unicode text"):
        read({"options": [["a", "b"], ["a", "\ud800"]], "answer": ["a", "a"]}, choices="options")


def test_the_same_examples_are_drawn_with_and_without_options() -> None:
    columns = {"answer": ["true", "false"]}
    assert (read(columns).digests == read(columns, choices=["true", "false"]).digests).all()


@pytest.mark.parametrize(
    ("options", "answer", "message"),
    [
        (["Rome", "Oslo"], "Bonn",
         "quiz: row 1: data.choices: the answer 'Bonn' must be one of the options, but equals none of: 'Rome', 'Oslo'"),
        (["Rome", "Rome "], "Rome", "but equals 2 of: 'Rome', 'Rome'"),
        ({"text": ["x", "y"], "label": ["A", "B"]}, "x", "'x' must be one of the labels of options, but equals none"),
        (["Rome"], "Rome", "quiz: row 1: data.choices: expected at least two options, got ['Rome']"),
        (["Rome", ""], "Rome", "quiz: row 1: column 'options': option 2 is empty"),
        ("Rome, Paris", "Rome", "column 'options': expected a list of options, or {text: [...], label: [...]}"),
        ({"text": ["x", "y"], "label": ["A"]}, "A", "of the same length"),
        (None, "Rome", "column 'options': expected a list of options"),
    ],
)  # fmt: skip
def test_unfit_rows_are_named(options: Any, answer: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read({"options": [options], "answer": [answer]}, choices="options")
    assert message in str(caught.value)


def test_unfit_settings_are_named() -> None:
    with pytest.raises(DataError, match=r"no column 'option' \(data.choices\).*did you mean 'options'"):
        read({"options": [["a", "b"]], "answer": ["a"]}, choices="option")
    with pytest.raises(DataError, match=r"no column 'c' \(data.choices.1\)"):
        read({"a": ["x"], "answer": ["x"]}, choices=["{a}", "{c}"])
    with pytest.raises(ValidationError, match="at least 2 templates"):
        Files.model_validate({"files": {"train": "-"}, "choices": ["{a}"]})


def quiz(folder: Path, size: int = 24) -> dict[str, Any]:
    rows = [{"question": f"Q{i}", "options": ["yes", "no", "who knows?"], "answer": "no"} for i in range(size)]
    (folder / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    templates = {"prompt": "{question}:", "answer": " {answer}", "choices": "options"}
    return {"source": "files", "files": {"train": str(folder / "quiz.jsonl")}, "max_length": 32, **templates}


RANKED = {"task": "causal_lm", "evaluation": {"metric": "multiple_choice"}, "clients": {"count": 2}}


def test_tokens_are_those_of_answers_without_an_end(tmp_path: Path, configure: Configure) -> None:
    config = configure(quiz(tmp_path), **RANKED)
    tokenizer = load_tokenizer(config.model)
    data = load_federated_data(config, tokenizer)
    for shard in data.shards.values():
        assert CHOICES not in shard.tables["train"].column_names
        rows = shard.tables["test"]
        assert rows.num_rows > 0
        for ids, labels, options in zip(*(rows[n].to_pylist() for n in ("input_ids", "labels", CHOICES)), strict=True):
            assert [option["text"] for option in options] == ["yes", "no", "who knows?"]
            assert [option["right"] for option in options] == [False, True, False]
            assert options[1]["input_ids"] == ids[:-1], "the answer without its end token"
            for option in options:
                assert labels[option["start"] - 1] == -100 != labels[option["start"]]
                text = tokenizer.decode(option["input_ids"][option["start"] :])
                assert text == f" {option['text']}"


def test_nothing_changes_without_the_metric(tmp_path: Path, configure: Configure) -> None:
    """Options that no metric ranks cost nothing, and the tokens of the examples come from the same cached file."""
    fields = quiz(tmp_path)
    plain = {name: value for name, value in fields.items() if name != "choices"}
    tokenizer = load_tokenizer(configure(fields).model)
    unranked = RANKED | {"evaluation": {}}
    found = [
        load_federated_data(configure(data, **sections), tokenizer)
        for data, sections in [(plain, unranked), (fields, unranked), (fields, RANKED)]
    ]
    for client, shard in found[0].shards.items():
        for split, table in shard.tables.items():
            assert found[1].shards[client].tables[split].equals(table)
            assert found[2].shards[client].tables[split].select(table.column_names).equals(table)
    assert found[0].fingerprint != found[1].fingerprint == found[2].fingerprint
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 2, "one of examples, one of options"


def test_options_are_tokenised_once(tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cached tokens give the same tables and notes; another option has tokens of its own."""
    fields, asked = quiz(tmp_path) | {"max_length": 10}, []
    tokenizer = load_tokenizer(configure(fields).model)
    encode = CausalEncoder.__call__
    monkeypatch.setattr(CausalEncoder, "__call__", lambda self, texts: asked.append(self.ends) or encode(self, texts))
    first, second = (load_federated_data(configure(fields, **RANKED), tokenizer) for _ in range(2))
    assert asked.count(False) == 1
    assert second.notes == first.notes
    assert any("options with their prompts" in note for note in first.notes)
    for client, shard in first.shards.items():
        assert second.shards[client].tables["test"].equals(shard.tables["test"])
    other = fields | {"choices": ["yes", "no", "who knows!"]}
    load_federated_data(configure(other, **RANKED), tokenizer)
    assert asked.count(False) == 2


def test_options_that_are_cut_are_noted(tmp_path: Path, configure: Configure) -> None:
    config = configure(quiz(tmp_path) | {"max_length": 10}, **RANKED)
    data = load_federated_data(config, load_tokenizer(config.model))
    assert any(
        "10 cuts" in note and "options with their prompts" in note and "lose the end" in note for note in data.notes
    )
    assert max(lengths(options_of(shard.tables["test"])).max() for shard in data.shards.values()) == 10


@pytest.mark.parametrize(
    ("changes", "sections", "message"),
    [
        ({"choices": None}, {}, "data.choices: evaluation.metrics: 'multiple_choice' ranks an example's options"),
        ({"choices": None, "choice_labels": [0, 1]}, {"evaluation": {}}, "data.choice_labels: there are no options"),
        ({"choices": None}, {"evaluation": {"metric": {"name": "multiple_choice", "normalise": "bytes"}}},
         "'multiple_choice_bytes' ranks"),
        ({"label": "answer", "text": "question"}, {"task": "classification", "evaluation": {}},
         "data.choices: the task 'classification' has no options"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_refused(
    tmp_path: Path, configure: Configure, changes: dict[str, Any], sections: dict[str, Any], message: str
) -> None:
    config = configure(quiz(tmp_path) | changes, **RANKED | sections)
    with pytest.raises(DataError) as caught:
        load_federated_data(config, load_tokenizer(config.model))
    assert message in str(caught.value)


def test_conversations_have_no_options(tmp_path: Path, configure: Configure) -> None:
    turns = [{"role": "user", "content": "Yes or no?"}, {"role": "assistant", "content": "Yes"}]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(8)))
    data = {"source": "files", "files": {"train": str(tmp_path / "chats.jsonl")}, "chat_template": "plain"}
    config = configure(data | {"choices": ["Yes", "No"]}, **RANKED)
    with pytest.raises(DataError, match="data.choices: the data are conversations, which have no options"):
        load_federated_data(config, load_tokenizer(config.model))


def test_parts_have_options_of_their_own(tmp_path: Path, configure: Configure) -> None:
    part = {name: value for name, value in quiz(tmp_path).items() if name != "max_length"}
    both = {"quiz": part, "other": part | {"choices": ["yes", "no"]}}
    config = configure({"source": "several", "parts": both}, {"kind": "distinct_task"}, **RANKED)
    shards = load_federated_data(config, load_tokenizer(config.model)).shards
    sizes = [{len(options) for options in s.tables["test"][CHOICES].to_pylist()} for s in shards.values()]
    assert sorted(map(sorted, sizes)) == [[2], [3]]
    both["other"] = part | {"choices": None}
    config = configure({"source": "several", "parts": both}, {"kind": "distinct_task"}, **RANKED)
    with pytest.raises(DataError, match=r"^data\.parts\.other\.choices: "):
        load_federated_data(config, load_tokenizer(config.model))


COMMONSENSE = {
    "boolq": ["true", "false"],
    "ARC-Easy": [f"answer{i}" for i in range(1, 6)],
    "ARC-Challenge": [f"answer{i}" for i in range(1, 6)],
    "openbookqa": [f"answer{i}" for i in range(1, 5)],
}


@pytest.mark.parametrize("name", COMMONSENSE)
def test_labels_of_commonsense_tasks(shared_data: Path, tmp_path: Path, configure: Configure, name: str) -> None:
    """Every row of LLM-Adapters' data has one of its task's labels as the answer."""
    folder = shared_data / "llm_adapters" / name
    files = {split: os.fspath(folder / f"{split}.json") for split in ("train", "test")}
    labels = [f"the correct answer is {label}" for label in COMMONSENSE[name]]
    data = {"source": "files", "files": files, "prompt": "{instruction}\n", "answer": "{output}", "choices": labels}
    config = configure(data | {"max_length": 512, "max_examples": 20, "max_test_examples": 20}, **RANKED)
    shards = load_federated_data(config, load_tokenizer(config.model)).shards
    for shard in shards.values():
        rows = shard.tables["test"]
        for answer, options in zip(rows["answer"].to_pylist(), rows[CHOICES].to_pylist(), strict=True):
            assert [option["text"] for option in options] == labels
            assert [option["text"] for option in options if option["right"]] == [answer]
