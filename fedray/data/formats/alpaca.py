"""`alpaca`: an instruction, an input that it may need, and the output (Taori et al., 2023)."""

from collections.abc import Mapping
from typing import Any

from fedray.data.formats.turns import Chat, Format, Pair, led_by_system, required_text
from fedray.data.reading.values import as_text

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def read(row: Mapping[str, Any], chat: bool) -> Chat | Pair:
    """Return a user's and an assistant's turn; without a chat template, the text that Alpaca was trained on."""
    instruction, output = (required_text(row[name], name) for name in ("instruction", "output"))
    given = as_text(row.get("input"))
    if chat:
        question = f"{instruction}\n\n{given}" if given.strip() else instruction
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
        return Chat(tuple(led_by_system(row, turns)))
    prompt = WITH_INPUT if given.strip() else WITHOUT_INPUT
    return Pair(prompt.format(instruction=instruction, input=given), output)


FORMAT = Format(("instruction", "output"), read, optional=("input", "system"))
