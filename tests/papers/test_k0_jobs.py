"""The jobs of kit K0 are valid, and measure what they say, with files in the published layout and a tiny model."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fedray
from fedray.cli.app import app
from fedray.config import Config, load_config

PAPERS = Path(__file__).parents[2] / "jobs" / "papers"

LABELS = {
    "boolq": "true",
    "piqa": "solution1",
    "social_i_qa": "answer3",
    "hellaswag": "ending2",
    "winogrande": "option1",
    "ARC-Easy": "answer4",
    "ARC-Challenge": "answer5",
    "openbookqa": "answer2",
}
"""A label of every commonsense task."""
ANSWERS: dict[str, Any] = {"AQuA": ["C"], "gsm8k": [2304.0], "mawps": "57.0", "SVAMP": "-22.0"}
"""An answer of every arithmetic task, as versions of the published files have it."""

TINY = {
    "model.path": "random",
    "model.tokenizer": "bytes",
    "model.config": {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    "partition.min_examples": 2,
}


def row(instruction: str, output: str, answer: Any) -> dict[str, Any]:
    return {"instruction": instruction, "input": "", "output": output, "answer": answer}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder beside LLM-Adapters', in which the commands of the jobs run."""
    published = tmp_path / "LLM-Adapters"
    files: dict[str, list[dict[str, Any]]] = {
        f"dataset/{task}/test.json": [row(f"Which one? {task}", f"the correct answer is {label}", label)] * 2
        for task, label in LABELS.items()
    }
    for task, answer in ANSWERS.items():
        files[f"dataset/{task}/test.json"] = [row(f"How many? {task}", "That makes 5. The answer is 5.", answer)] * 2
    files["ft-training_set/commonsense_170k.json"] = [rows[0] for name, rows in files.items() if "boolq" in name] * 40
    files["ft-training_set/math_10k.json"] = [row("How many are 2 and 3?", "2 and 3 are 5. The answer is 5.", "5")] * 40
    for name, rows in files.items():
        file = published / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(rows))
    folder = tmp_path / "checkout"
    folder.mkdir()
    monkeypatch.chdir(folder)
    runpy.run_path(str(PAPERS / "maths_tests.py"))["convert"](published / "dataset", tmp_path / "maths_tests")
    return folder


def kit(name: str, **changes: Any) -> Config:
    return load_config(PAPERS / f"{name}.yaml", {**TINY, "data.cache_dir": "cache", **changes})


@pytest.mark.parametrize("name", ["k0_reft_commonsense", "k0_reft_maths"])
def test_it_loads_and_is_valid(name: str, checkout: Path) -> None:
    assert load_config(PAPERS / f"{name}.yaml").model.path == "yahma/llama-7b-hf"
    changes = {**TINY, "data.cache_dir": "cache"}
    overrides = [f"{path}={value if isinstance(value, str) else json.dumps(value)}" for path, value in changes.items()]
    ended: Any = CliRunner().invoke(app, ["validate", str(PAPERS / f"{name}.yaml"), *overrides])
    assert ended.exit_code == 0, ended.output
    assert "the experiment is valid" in ended.output


@pytest.mark.parametrize(
    ("name", "sets", "metrics"),
    [
        ("k0_reft_commonsense", LABELS, {"after_phrase_match", "first_label_match"}),
        ("k0_reft_maths", ANSWERS, {"maths_match"}),
    ],
)
def test_every_task_has_its_scores(
    name: str, sets: dict[str, Any], metrics: set[str], checkout: Path, tmp_path: Path
) -> None:
    changes = {"train.epochs": 1, "evaluation.max_new_tokens": 2, "device": "cpu", "runtime": "inline"}
    result = fedray.run(kit(name, **changes), output=tmp_path / "run")
    assert set(result.evaluations()["moment"]) == {"aggregated"}
    found = result.evaluations().query("phase == 'final' and group != ''")
    assert set(found["group"]) == set(sets)
    assert set(found["metric"]) == metrics
    assert set(found["examples"]) == {"test"}
    assert result.clients()["steps"].tolist() == [2, 0]  # 40 rows, 16 × 2 a step; nothing in the final pass


def test_the_answers_of_arithmetic_tasks(checkout: Path) -> None:
    """Not the solutions, which are wrong here as some are in the published files."""
    for task, answer in {"AQuA": "C", "gsm8k": "2304.0", "mawps": "57.0", "SVAMP": "-22.0"}.items():
        rows = json.loads((checkout.parent / "maths_tests" / f"{task}.json").read_text())
        assert [row["output"] for row in rows] == [answer, answer]
