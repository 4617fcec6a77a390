"""Conversations as turns: the one form that all formats of instruction data are read into."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedray.data.reading.values import is_missing, shown
from fedray.errors import choices, nearest

Turn = Mapping[str, Any]
"""`role` (system, developer, user, assistant, tool), `content`, and what else the row says, for the chat template."""

ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "function_call"), "assistant"),
    **dict.fromkeys(("function", "observation", "function_response"), "tool"),
}
"""The names that data sets give to the roles. A `function_call` is text that the model writes."""


@dataclass(frozen=True)
class Chat:
    """A conversation up to its last assistant turn.

    Attributes:
        context: number of leading turns without loss, the assistant's included.
    """

    turns: tuple[Turn, ...]
    context: int = 0

    @classmethod
    def of(cls, turns: Sequence[Turn], context: int = 0) -> "Chat":
        """Return the conversation without the turns after the last assistant turn, from which nothing is learned.

        Raises:
            ValueError: no assistant turn is left to learn.
        """
        last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=-1)
        if last < context:
            raise ValueError("there is no assistant turn to learn from; leave such rows out")
        return cls(tuple(turns[: last + 1]), context)


@dataclass(frozen=True)
class Pair:
    """A prompt and its answer, as text that no chat template changes."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Format:
    """How one format is read.

    Attributes:
        columns: the columns that tell it apart; every row has a value in each.
        read: returns what a row says. Its second argument is whether there is a chat template; it raises ValueError
            with what is wrong, to which the caller adds the place.
        optional: further columns that it reads.
    """

    columns: tuple[str, ...]
    read: Callable[[Mapping[str, Any], bool], Chat | Pair]
    optional: tuple[str, ...] = ()


def turns_of(value: Any) -> list[Turn]:
    """Return the turns of a conversation: objects with `role` and `content`, or `from` and `value`.

    Args:
        value: a list, or its JSON text, which is how a CSV file holds it.

    Raises:
        ValueError: it is no such list; the message says which turn.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"expected a list of turns as JSON, got {shown(value)}: {error}") from None
    if not isinstance(value, list) or not value:
        raise ValueError(f"expected a list of turns, got {shown(value)}")
    return [_turn(turn, f"turn {number}") for number, turn in enumerate(value, start=1)]


def led_by_system(row: Mapping[str, Any], turns: Sequence[Turn]) -> list[Turn]:
    """Return the turns after the row's own column `system`, if it has one and the turns do not begin with such a turn.

    Raises:
        ValueError: the column holds something else than a text.
    """
    system = row.get("system")
    if is_missing(system) or turns[0]["role"] == "system":
        return list(turns)
    return [{"role": "system", "content": required_text(system, "system")}, *turns]


def required_text(value: Any, column: str) -> str:
    """Return a text that a row must have.

    Raises:
        ValueError: it is missing, blank, or no text.
    """
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"column {column!r}: expected a text, got {shown(value)}")
    return value


def _turn(turn: Any, where: str) -> Turn:
    if not isinstance(turn, Mapping):
        raise ValueError(f"{where}: expected an object with `role` and `content`, got {shown(turn)}")
    names = ("from", "value") if turn.get("role") is None and turn.get("from") is not None else ("role", "content")
    given, content = (turn.get(name) for name in names)
    role = ROLES.get(str(given).lower())
    if role is None:
        allowed = f"allowed: {choices(ROLES)}"
        raise ValueError(f"{where}: `{names[0]}`: unknown role {given!r}{nearest(str(given), ROLES)}; {allowed}")
    if turn.get("tool_calls"):
        raise ValueError(f"{where}: `tool_calls` are not read; write the call into `content`, or leave such rows out")
    text = _content(content, f"{where}: `{names[1]}`")
    if role == "assistant" and not text.strip():
        raise ValueError(f"{where}: the assistant's `{names[1]}` is empty; leave such rows out")
    rest = {key: entry for key, entry in turn.items() if entry is not None and key not in (*names, "tool_calls")}
    return {"role": role, "content": text, **rest}


def _content(content: Any, where: str) -> str:
    """Return a turn's text: a string, or parts of the type `text`, one after another."""
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        return "".join(str(part.get("text") or "") for part in content)
    raise ValueError(f"{where}: expected a text, or a list of parts of the type `text`, got {shown(content)}")
