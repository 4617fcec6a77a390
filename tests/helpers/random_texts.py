"""Clients whose texts are random, and as long as a test wants them."""

import json
import random
from pathlib import Path
from typing import Any

ROWS = 24
"""Of every client: 14 for training, 6 for the test, 4 for validation."""


def rows(task: str, prompt: tuple[int, int], answer: tuple[int, int], options: int = 0) -> list[dict[str, Any]]:
    """Random texts of a byte per token.

    Args:
        prompt: the shortest and the longest prompt; or text, if the task has no answers.
        answer: the shortest and the longest answer.
        options: length of a wrong answer that every row has; 0: there is none.
    """
    rng = random.Random(1)

    def text(shortest: int, longest: int) -> str:
        return "".join(rng.choices("abcdefgh", k=rng.randint(shortest, longest)))

    if task != "causal_lm":
        label = {"classification": lambda: rng.choice("xyz"), "regression": rng.random}[task]
        return [{"text": text(*prompt), "label": label()} for _ in range(ROWS)]
    found: list[dict[str, Any]] = [{"prompt": text(*prompt), "answer": text(*answer)} for _ in range(ROWS)]
    if options:
        found = [{**row, "options": [row["answer"], text(options, options)]} for row in found]
    return found


def write_clients(
    folder: Path, task: str, prompt: tuple[int, int], answer: tuple[int, int], options: int = 0, clients: int = 2
) -> None:
    """Write a file of `rows` per client, `0.jsonl` and so on; each begins with another row."""
    texts = rows(task, prompt, answer, options)
    for client in range(clients):
        lines = "".join(json.dumps(row) + "\n" for row in texts[client:] + texts[:client])
        (folder / f"{client}.jsonl").write_text(lines)
