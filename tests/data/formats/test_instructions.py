"""Formats of instruction data: what a row says, which format the columns have, and where a mistake is."""

import json
from typing import Any, get_args

import pytest

from fedray.config import DataConfig, RawRows
from fedray.config.data import FormatName
from fedray.data.examples import assemble
from fedray.data.formats.instructions import FORMATS, find_instructions
from fedray.data.formats.turns import Chat, Pair, turns_of
from fedray.data.sources.files import Files
from fedray.errors import DataError

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
SYSTEM = {"role": "system", "content": "Be brief."}
SYSTEM_SAID = {"from": "system", "value": "Be brief."}
SAID = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
HEAD = "Below is an instruction that describes a task"
RESPOND = "Write a response that appropriately completes the request.\n\n### Instruction:\n"


def test_every_format_can_be_configured() -> None:
    assert set(FORMATS) == set(get_args(FormatName))


CALL = [SAID[0], {"from": "function_call", "value": "f(1)"}, {"from": "observation", "value": "2"}, SAID[1]]
CALLED = (USER, ANSWER | {"content": "f(1)"}, {"role": "tool", "content": "2"}, ANSWER)
PARTS = [USER | {"name": "Ann", "tool_calls": None}, ANSWER | {"content": [{"type": "text", "text": "Yes"}]}]
SUM = {"instruction": "Add.", "input": "1 2", "output": "3"}
NO_INPUT = SUM | {"input": float("nan")}
WITH = f"{HEAD}, paired with an input that provides further context. {RESPOND}Add."
WITH += "\n\n### Input:\n1 2\n\n### Response:\n"
WITHOUT = f"{HEAD}. {RESPOND}Add.\n\n### Response:\n"


def asked(question: str, answer: str) -> Chat:
    return Chat(({"role": "user", "content": question}, {"role": "assistant", "content": answer}))


ROWS: list[tuple[str, dict[str, Any], bool, Chat | Pair]] = [
    ("messages", {"messages": [SYSTEM, USER, ANSWER]}, True, Chat((SYSTEM, USER, ANSWER))),
    ("messages", {"messages": json.dumps([USER, ANSWER])}, True, Chat((USER, ANSWER))),
    ("messages", {"messages": [USER, ANSWER, USER]}, True, Chat((USER, ANSWER))),
    ("messages", {"messages": PARTS}, True, Chat((USER | {"name": "Ann"}, ANSWER | {"content": "Yes"}))),
    ("sharegpt", {"conversations": [SYSTEM_SAID, *SAID]}, True, Chat((SYSTEM, USER, ANSWER))),
    ("sharegpt", {"conversations": [USER, ANSWER]}, True, Chat((USER, ANSWER))),
    ("sharegpt", {"conversations": SAID, "system": "Be brief."}, True, Chat((SYSTEM, USER, ANSWER))),
    ("sharegpt", {"conversations": [SYSTEM_SAID, *SAID], "system": "No."}, True, Chat((SYSTEM, USER, ANSWER))),
    ("messages", {"messages": [USER, ANSWER], "system": None}, True, Chat((USER, ANSWER))),
    ("alpaca", SUM | {"system": "Be brief."}, True, Chat((SYSTEM, *asked("Add.\n\n1 2", "3").turns))),
    ("sharegpt", {"conversations": CALL}, True, Chat(CALLED)),
    ("alpaca", SUM, True, asked("Add.\n\n1 2", "3")),
    ("alpaca", NO_INPUT, True, asked("Add.", "3")),
    ("alpaca", SUM, False, Pair(WITH, "3")),
    ("alpaca", NO_INPUT, False, Pair(WITHOUT, "3")),
    ("alpaca", {"instruction": "{Add}", "output": "3"}, False, Pair(WITHOUT.replace("Add.", "{Add}"), "3")),
    ("prompt_completion", {"prompt": "1 + 1 =", "completion": " 2"}, True, Pair("1 + 1 =", " 2")),
    ("prompt_completion", {"prompt": None, "completion": "2"}, False, Pair("", "2")),
    ("prompt_completion", {"prompt": [USER, ANSWER], "completion": [USER, ANSWER]}, True, Chat((USER, ANSWER) * 2, 2)),
]


@pytest.mark.parametrize(("name", "row", "chat", "expected"), ROWS)
def test_a_row_is_a_conversation_or_prompt_and_answer(
    name: str, row: dict[str, Any], chat: bool, expected: Chat | Pair
) -> None:
    assert FORMATS[name].read(row, chat) == expected


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("messages", {"messages": None}, "expected a list of turns, got nothing"),
    ("messages", {"messages": []}, "expected a list of turns"),
    ("messages", {"messages": "Hi"}, "expected a list of turns as JSON, got 'Hi'"),
    ("messages", {"messages": [USER]}, "no assistant turn to learn from"),
    ("messages", {"messages": [USER, "Hello."]}, "turn 2: expected an object with"),
    ("messages", {"messages": [USER, ANSWER | {"role": "asistant"}]}, "turn 2: .*did you mean 'assistant'"),
    ("messages", {"messages": [USER, ANSWER | {"content": " "}]}, "turn 2: the assistant's `content` is empty"),
    ("messages", {"messages": [USER, ANSWER | {"tool_calls": [{"id": "1"}]}]}, "turn 2: `tool_calls` are not read"),
    ("messages", {"messages": [USER | {"content": [{"type": "image"}]}, ANSWER]}, "turn 1: .*parts of the type"),
    ("sharegpt", {"conversations": [SAID[0], SAID[1] | {"value": None}]}, "`value` is empty"),
    ("alpaca", {"instruction": "Add.", "output": None}, "column 'output': expected a text, got nothing"),
    ("prompt_completion", {"prompt": "a", "completion": ""}, "column 'completion': expected a text"),
    (
        "prompt_completion",
        {"prompt": "a", "completion": [ANSWER]},
        "a list of turns, but `prompt` is 'a'",
    ),
    (
        "prompt_completion",
        {"prompt": [USER], "completion": "a"},
        "a list of turns, but `completion` is 'a'",
    ),
    ("prompt_completion", {"prompt": [ANSWER], "completion": [USER]}, "no assistant turn to learn from"),
]


@pytest.mark.parametrize(("name", "row", "message"), WRONG)
def test_a_wrong_row_is_located(name: str, row: dict[str, Any], message: str) -> None:
    right = {"messages": [USER, ANSWER], "conversations": SAID, "instruction": "Add.", "output": "3"}
    right |= {"prompt": row.get("prompt"), "completion": "2" if isinstance(row.get("prompt"), str) else [ANSWER]}
    columns = {column: [right[column], value] for column, value in row.items()}
    raw = RawRows("train.jsonl", columns, "train", rows=[1, 7], unit="line")
    data = Files.model_validate({"files": {"train": "-"}, "format": name})
    with pytest.raises(DataError, match=f"train.jsonl: line 7: data.format '{name}': .*{message}"):
        assemble([raw], data, "causal_lm", find_instructions([raw], data, True))


def config(**settings: Any) -> DataConfig:
    return Files.model_validate({"files": {"train": "-"}} | settings)


def rows(*columns: str) -> RawRows:
    return RawRows("train.jsonl", {column: ["x"] for column in columns}, "train")


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (("messages", "prompt", "id"), "messages"),
        (("conversations",), "sharegpt"),
        (("instruction", "output", "input"), "alpaca"),
        (("instruction", "output"), "alpaca"),
        (("prompt", "completion"), "prompt_completion"),
        (("prompt", "answer", "messages"), None),
        (("instruction", "response"), None),
    ],
)
def test_the_format_is_detected_from_the_columns(columns: tuple[str, ...], expected: str | None) -> None:
    found = find_instructions([rows(*columns), rows(*columns, "more")], config(), False)
    assert [layout.name for layout in found.values()] == [expected] * (expected is not None)
    if expected is not None:
        named = " and ".join(map(repr, FORMATS[expected].columns))
        assert f"in the format {expected!r}, detected from the column" in found["data"].notes(columns)[0]
        assert named in found["data"].notes(columns)[0]
        assert not find_instructions([rows(*columns)], config(format=expected), False)["data"].notes(columns)


def test_nothing_is_detected_where_the_configuration_or_another_file_says_otherwise() -> None:
    assert find_instructions([rows("messages")], config(prompt="{messages}"), False) == {}
    assert find_instructions([rows("messages"), rows("prompt", "answer")], config(), False) == {}


def test_several_formats_at_once_are_refused() -> None:
    with pytest.raises(DataError, match=r"several formats .*: messages, alpaca; name one as data\.format"):
        find_instructions([rows("messages", "instruction", "output")], config(), False)


def test_a_format_needs_its_columns() -> None:
    message = (
        r"train.jsonl: data.format 'alpaca' reads the columns 'instruction' and 'output', but there is no column "
        r"'output' \(did you mean 'outputs'\?\); its columns: instruction, outputs, messages; the columns are those of"
    )
    with pytest.raises(DataError, match=message):
        find_instructions([rows("instruction", "outputs", "messages")], config(format="alpaca"), False)


def test_rows_of_two_kinds_are_refused() -> None:
    raw = RawRows("here", {"prompt": ["a", [USER]], "completion": ["b", [ANSWER]]}, "train")
    with pytest.raises(DataError, match="here: row 2: earlier rows are a text, this one is a list of turns"):
        assemble([raw], config(), "causal_lm", find_instructions([raw], config(), True))


def test_half_a_letter_is_located() -> None:
    raw = RawRows("here", {"messages": [[USER, ANSWER], [USER, ANSWER | {"content": "\ud83d"}]]}, "train")
    with pytest.raises(DataError, match="here: row 2: not a Unicode text"):
        assemble([raw], config(), "causal_lm", find_instructions([raw], config(), True))


def test_a_name_is_not_the_content_of_a_turn() -> None:
    """`from` may be an empty column of a table that also has roles."""
    assert turns_of([USER | {"from": None, "value": None}]) == [USER | {}]


def test_columns_of_a_conversation_that_are_not_read_are_noted() -> None:
    columns = ("conversations", "system", "tools", "topic")
    chats = find_instructions([rows(*columns)], config(format="sharegpt"), True)["data"]
    assert chats.notes(columns) == ("data.format 'sharegpt' does not read the column 'tools'",)
    texts = find_instructions([rows("instruction", "output", "system")], config(format="alpaca"), False)["data"]
    assert texts.notes(["system"]) == ("data.format 'alpaca' does not read the column 'system'",)
