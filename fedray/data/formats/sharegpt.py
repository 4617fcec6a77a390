"""`sharegpt`: a conversation as a list of {from, value}; `from` is human, gpt, system or another name of a role."""

from collections.abc import Mapping
from typing import Any

from fedray.data.formats.turns import Chat, Format, led_by_system, turns_of


def read(row: Mapping[str, Any], chat: bool) -> Chat:
    """Return the conversation."""
    return Chat.of(led_by_system(row, turns_of(row["conversations"])))


FORMAT = Format(("conversations",), read, optional=("system",))
