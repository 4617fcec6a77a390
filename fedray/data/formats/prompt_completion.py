"""`prompt_completion`: two texts, which are joined as they are, or two lists of turns of one conversation."""

from collections.abc import Mapping
from typing import Any

from fedray.data.formats.turns import Chat, Format, Pair, required_text, turns_of
from fedray.data.reading.values import as_text, shown


def read(row: Mapping[str, Any], chat: bool) -> Chat | Pair:
    """Return the two texts, or the conversation, in which only the assistant's turns of `completion` have a loss."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(completion, list):
        if not isinstance(prompt, list):
            raise ValueError(f"`completion` is a list of turns, but `prompt` is {shown(prompt)}")
        context = turns_of(prompt)
        return Chat.of([*context, *turns_of(completion)], len(context))
    if isinstance(prompt, list):
        raise ValueError(f"`prompt` is a list of turns, but `completion` is {shown(completion)}")
    return Pair(as_text(prompt), required_text(completion, "completion"))


FORMAT = Format(("prompt", "completion"), read)
