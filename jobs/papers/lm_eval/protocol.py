"""Rows, prompts and scores of the tasks in this folder; their YAML files name these functions.

The rows are the files of LLM-Adapters, DATASET/TASK/test.json, and are read from the folder that `--metadata
llm_adapters=DATASET` names, else from the one in the environment variable LLM_ADAPTERS, else from
../LLM-Adapters/dataset.

    git clone https://github.com/AGI-Edgerunners/LLM-Adapters ../LLM-Adapters
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from fedray.errors import DataError
from fedray.evaluation.metrics.extracted_match import ExtractedMatch

Row = Mapping[str, Any]

INDENT = " " * 16
"""The published evaluation of LLM-Adapters indents every line of its prompt but the first."""

PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
RULES = {
    name: ExtractedMatch(rule=name)  # type: ignore[arg-type]  # a rule's name is parsed
    for name in ("first_label", "after_phrase", "maths")
}


def rows(dataset: str, llm_adapters: str | None = None, **_: Any) -> dict[str, datasets.Dataset]:
    """Return a task's test rows, with the columns `instruction` and `answer`.

    Args:
        dataset: name of the task's folder; its YAML file says it.
        llm_adapters: folder of the tasks' folders.

    Raises:
        DataError: there is no such file, or a row of it lacks a column.
    """
    folder = Path(llm_adapters or os.environ.get("LLM_ADAPTERS") or "../LLM-Adapters/dataset")
    file = folder / dataset / "test.json"
    if not file.is_file():
        raise DataError(
            f"{file}: does not exist; name the folder of LLM-Adapters' test sets with --metadata llm_adapters=FOLDER "
            "or the environment variable LLM_ADAPTERS"
        )
    try:
        found = [{"instruction": str(row["instruction"]), "answer": _only(row["answer"])} for row in _read(file)]
    except (KeyError, TypeError) as error:
        raise DataError(f"{file}: expected rows with `instruction` and `answer`: {error}") from None
    return {"test": datasets.Dataset.from_list(found)}


def indented_alpaca(row: Row) -> str:
    """Return LLM-Adapters' prompt."""
    lines = [f"{PREAMBLE} ", "", f"{INDENT}### Instruction:", INDENT + row["instruction"]]
    return "\n".join([*lines, "", f"{INDENT}### Response:", INDENT])


def alpaca(row: Row) -> str:
    """Return pyreft's prompt of arithmetic tasks."""
    return f"{PREAMBLE}\n\n### Instruction:\n{row['instruction']}\n\n### Response:\n"


def instruction(row: Row) -> str:
    """Return pyreft's prompt of commonsense tasks."""
    return f"{row['instruction']}\n"


def labels(row: Row, texts: Sequence[str]) -> dict[str, float]:
    """Return whether the text gives the right label: by the first label in it (LLM-Adapters), and by what follows "the
    correct answer is " (pyreft)."""
    return _scores(row, texts, "first_label", "after_phrase")


def solutions(row: Row, texts: Sequence[str]) -> dict[str, float]:
    """Return whether the text's last number, or for AQuA its first letter from A to E, is right."""
    return _scores(row, texts, "maths")


def _scores(row: Row, texts: Sequence[str], *rules: str) -> dict[str, float]:
    return {RULES[rule].label: RULES[rule].compute([texts[0]], [row["answer"]]) for rule in rules}


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: is not JSON: {error}") from None


def _only(answer: Any) -> str:
    """Return an answer as text; some versions of the files have it in a list of one."""
    if isinstance(answer, list):
        (answer,) = answer
    return str(answer).strip()
