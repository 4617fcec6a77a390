"""`messages`: a conversation as a list of {role, content}, as in the chat APIs."""

from collections.abc import Mapping
from typing import Any

from fedray.data.formats.turns import Chat, Format, led_by_system, turns_of


def read(row: Mapping[str, Any], chat: bool) -> Chat:
    """Return the conversation."""
    return Chat.of(led_by_system(row, turns_of(row["messages"])))


FORMAT = Format(("messages",), read, optional=("system",))
