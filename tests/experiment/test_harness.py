"""A run's models in lm-evaluation-harness, from the command and from Python, on local tasks; the tasks of
jobs/papers/lm_eval."""

import json
import re
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from tiny import TINY_LLAMA, tiny_bert
from typer.testing import CliRunner

import fedray
from fedray.cli.app import app
from fedray.errors import ConfigError, StateError
from fedray.evaluation.evaluate import evaluating
from fedray.evaluation.losses import score
from fedray.experiment.harness import load_tasks
from fedray.experiment.restore import FinishedRun, restore

pytest.importorskip("lm_eval", reason="needs the extra lm-eval")

TASKS = Path(__file__).resolve().parents[2] / "jobs" / "papers" / "lm_eval"
SHARED = TASKS.parents[3] / "shared" / "data" / "llm_adapters"

COMMONSENSE = {
    "boolq": ("boolq", "true"),
    "piqa": ("piqa", "solution2"),
    "siqa": ("social_i_qa", "answer3"),
    "hellaswag": ("hellaswag", "ending4"),
    "winogrande": ("winogrande", "option1"),
    "arc_easy": ("ARC-Easy", "answer1"),
    "arc_challenge": ("ARC-Challenge", "answer5"),
    "openbookqa": ("openbookqa", "answer2"),
}
MATHS = {"aqua": ("AQuA", "C"), "gsm8k": ("gsm8k", "1234"), "mawps": ("mawps", [7.0]), "svamp": ("SVAMP", "-3.5")}
"""By task: its folder, and the answer of a row as the files have it."""


def experiment(**fields):
    return {
        "runtime": "inline",
        "device": "cpu",
        "rounds": 1,
        "seed": 3,
        "method": ["fedavg", {"name": "fedavg", "label": "reft", "adapter": "reft"}, "fedalt"],
        "task": "causal_lm",
        "model": {"path": "random", "tokenizer": "bytes", "config": {**TINY_LLAMA, "initializer_range": 0.3}},
        "data": {"source": "synthetic", "examples_per_client": 12, "max_length": 48},
        "partition": {"kind": "by_file"},
        "clients": {"count": 2},
        "train": {"lr": 5e-2, "max_steps": 3, "batch_size": 4},
        "lora": {"rank": 2, "alpha": 8, "targets": ["q_proj", "v_proj"]},
        "reft": {"rank": 2, "positions": "f7+l7"},
        **fields,
    }


def call(*arguments):
    return CliRunner().invoke(app, ["lm-eval", *map(str, arguments)], env={"COLUMNS": "140"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("harness")


@pytest.fixture(scope="module")
def run(folder):
    return fedray.run(experiment(), output=folder / "run")


@pytest.fixture(scope="module")
def letters(folder):
    """The folder of a task with three options per question, and its rows."""
    rows = [
        {"question": f"which of {a}{b}{c}", "options": [f" {a}{b}", f" {b}", f" {c}{a}{b}"], "right": index % 3}
        for index, (a, b, c) in enumerate(zip("qwertzuiop", "asdfghjkly", "xcvbnmqwer", strict=True))
    ]
    place = folder / "tasks"
    place.mkdir()
    (place / "letters.json").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "letters",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(place / "letters.json")},
            "cache_dir": str(folder / "datasets"),
        },
        "test_split": "test",
        "fewshot_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "options",
        "doc_to_target": "right",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    (place / "letters.yaml").write_text(yaml.safe_dump(task))
    return place, rows


@pytest.fixture(scope="module")
def llm_adapters(folder):
    """A folder with test sets in the layout of LLM-Adapters, two rows each."""
    for dataset, answer in {**COMMONSENSE, **MATHS}.values():
        (folder / "sets" / dataset).mkdir(parents=True)
        rows = [{"instruction": f"{dataset} {n}?", "input": "", "output": "", "answer": answer} for n in (1, 2)]
        (folder / "sets" / dataset / "test.json").write_text(json.dumps(rows))
    return folder / "sets"


def accuracy(model, rows):
    """Return the share of rows whose right option has the least loss: bytes have no tokens across the border."""
    right = 0
    for row in rows:
        front, losses = [257, *row["question"].encode()], []
        for option in row["options"]:
            whole = [*front, *option.encode()]
            labels = torch.tensor([[-100] * len(front) + whole[len(front) :]])
            with evaluating(model):
                losses.append(
                    score(model, {"input_ids": torch.tensor([whole]), "labels": labels}, "causal_lm").losses.sum()
                )
        right += int(torch.stack(losses).argmin()) == row["right"]
    return right / len(rows)


def test_the_command_shows_the_base_model_beside_the_run_s_models(run, letters, tmp_path):
    """Servers' and a client's models, each with its accuracy computed one by one, in the table and in both files."""
    place, rows = letters
    common = (run.place, "--tasks", "letters", "--include-path", place, "--method", "fedavg", "--method", "reft")
    client = next(iter(FinishedRun(run).clients(run.config.method[0])))
    ended = call(*common, "--client", client, "--server", "--output", tmp_path / "out.csv")
    assert ended.exit_code == 0, ended.output
    expected = {"base": accuracy(FinishedRun(run).base_model("float32"), rows)}
    for method in ("fedavg", "reft"):
        expected[f"{method} server"] = accuracy(restore(run.place, method).model, rows)
        expected[f"{method} {client}"] = accuracy(restore(run.place, method, client).model, rows)
    table = pd.read_csv(tmp_path / "out.csv").set_index("model")
    assert table["value"].to_dict() == pytest.approx(expected)
    assert table["difference"].to_dict() == pytest.approx(
        {name: acc - expected["base"] for name, acc in expected.items()}
    )
    assert set(table["examples"]) == {10}
    for name, value in expected.items():
        assert f"{name:<{max(map(len, expected))}}  {value:.4f}" in ended.output
    assert "frozen base model" in ended.output
    assert "reportable" not in ended.output
    limited = call(*common[:5], "--method", "fedalt", "--client", client, "--moment", "aggregated", "--limit", 4)
    assert limited.exit_code == 0, limited.output
    assert "limit: 4: only a part of each task was evaluated; these numbers are not reportable" in limited.output


def test_every_model_gets_the_same_examples_in_its_prompts(run, letters, tmp_path):
    """A model that is evaluated twice has the same numbers, with few examples drawn at random; they are in the file."""
    result = fedray.lm_eval(run, "letters", method=["reft", "reft"], include_path=letters[0], num_fewshot=2)
    (base, *others) = result.to_pandas().to_dict("records")
    assert others[0] == others[1]
    assert dict(result.num_fewshot) == {"letters": 2}
    result.write(tmp_path / "out.json")
    written = json.loads((tmp_path / "out.json").read_text())
    assert [score["value"] for score in written["scores"]] == [row["value"] for row in (base, *others)]
    assert written["harness"].startswith("0.4.")


def test_the_papers_tasks_take_gold_texts_for_right(llm_adapters, monkeypatch):
    """All 24 tasks and their groups load from one folder, given either way; their prompts, and their rules on right,
    wrong and half-right texts."""
    groups = [f"{protocol}_{kind}" for protocol in ("llm_adapters", "pyreft") for kind in ("commonsense", "maths")]
    loaded = load_tasks(groups, [str(TASKS)], {"llm_adapters": str(llm_adapters)})["tasks"]
    assert len(loaded) == 24
    for protocol in ("llm_adapters", "pyreft"):
        for name, (dataset, answer) in COMMONSENSE.items():
            task = loaded[f"{protocol}_{name}"]
            (row, _) = task.test_docs()
            assert task.process_results(row, [f"the correct answer is {answer}"]) == {
                "first_label_match": 1.0,
                "after_phrase_match": 1.0,
            }
            assert task.process_results(row, [f"it is {answer}."]) == {
                "first_label_match": 1.0,
                "after_phrase_match": 0.0,
            }
            assert row["instruction"] == f"{dataset} 1?"
        for name, (_, answer) in MATHS.items():
            task = loaded[f"{protocol}_{name}"]
            gold = answer[0] if isinstance(answer, list) else answer
            row = task.test_docs()[0]
            assert task.process_results(row, [f"so it is {gold}"]) == {"maths_match": 1.0}
            assert task.process_results(row, ["so it is 99 or B"]) == {"maths_match": 0.0}
    row = loaded["pyreft_boolq"].test_docs()[0]
    assert loaded["pyreft_boolq"].doc_to_text(row) == "boolq 1?\n"
    preamble = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    )
    blank = " " * 16
    assert loaded["llm_adapters_boolq"].doc_to_text(row) == (
        f"{preamble} \n\n{blank}### Instruction:\n{blank}boolq 1?\n\n{blank}### Response:\n{blank}"
    )
    assert loaded["pyreft_svamp"].doc_to_text(row).endswith("### Instruction:\nboolq 1?\n\n### Response:\n")
    assert loaded["llm_adapters_gsm8k"].config.generation_kwargs == {"num_beams": 4, "max_gen_toks": 256, "until": []}
    monkeypatch.setenv("LLM_ADAPTERS", str(llm_adapters))
    assert load_tasks(["pyreft_boolq"], [str(TASKS)], {})["tasks"]
    with pytest.raises(ConfigError, match=r"nowhere/boolq/test.json: does not exist; name the folder of LLM-Adapters"):
        load_tasks(["pyreft_boolq"], [str(TASKS)], {"llm_adapters": "nowhere"})


def test_a_group_of_the_papers_tasks_runs_with_beams(run, llm_adapters, tmp_path):
    """LoReFT on four tasks with four beams: the group's row is the mean of its tasks."""
    options = ("--include-path", TASKS, "--metadata", f"llm_adapters={llm_adapters}", "--limit", 1)
    file = tmp_path / "out.csv"
    ended = call(run.place, "--tasks", "llm_adapters_maths", "--method", "reft", *options, "--output", file)
    assert ended.exit_code == 0, ended.output
    table = pd.read_csv(file)
    assert table["model"].unique().tolist() == ["base", "reft server"]
    assert set(table["task"]) == {f"llm_adapters_{name}" for name in (*MATHS, "maths")}
    for _, rows in table.groupby("model"):
        values = rows.set_index("task")["value"]
        assert values["llm_adapters_maths"] == pytest.approx(values.drop("llm_adapters_maths").mean())


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the test sets in ../shared/data/llm_adapters")
def test_a_task_runs_on_the_published_rows(run):
    result = fedray.lm_eval(
        run, "pyreft_arc_easy", method="fedavg", include_path=TASKS, metadata={"llm_adapters": str(SHARED)}, limit=2
    )
    assert {score.examples for score in result.scores} == {2}
    assert {score.metric for score in result.scores} == {"first_label_match", "after_phrase_match"}


def test_what_cannot_be_done_is_said(run, letters, tmp_path, monkeypatch):
    place, _ = letters
    own = ("--tasks", "letters", "--include-path", place)
    for arguments, message in (
        (own, "method: .* has fedavg, reft, fedalt; name one"),
        ((*own, "--method", "fedavgg"), r"no finished method 'fedavgg' \(did you mean 'fedavg'\?\)"),
        ((*own, "--method", "fedalt", "--client", "client_9"), "no client 'client_9' .*it has client_"),
        ((*own, "--method", "fedalt"), "fedalt: the server has no model of its own"),
        ((*own[:3], place / "no", "--method", "reft"), "include_path: .*no is not a folder"),
        ((*own, "--method", "reft", "--limit", "0"), "limit: expected a number above 0, got 0"),
        ((*own, "--method", "reft", "--metadata", "letters"), "--metadata 'letters': expected key=value"),
        (("--tasks", ",", "--method", "reft"), "tasks: expected the name of at least one task"),
        ((*own, "--method", "reft", "--output", "x.txt"), "--output x.txt: expected a file that ends in .json, .csv"),
    ):
        ended = call(run.place, *arguments)
        assert ended.exit_code == 2, ended.output
        assert re.search(message, ended.output), ended.output
    (place / "broken.yaml").write_text("task: broken\ndataset_path: json\ndataset_kwargs: {data_files: nowhere.json}\n")
    with pytest.raises(ConfigError, match="tasks: broken cannot be loaded: .*nowhere"):
        load_tasks(["broken"], [str(place)], {})
    other = fedray.run(
        experiment(model=tiny_bert(), task="classification", method="local", lora={"rank": 2}),
        output=tmp_path / "other",
    )
    with pytest.raises(ConfigError, match="task: classification: lm-evaluation-harness evaluates language models"):
        fedray.lm_eval(other, "letters")
    with pytest.raises(StateError, match="has no summary.json"):
        fedray.lm_eval(tmp_path, "letters")
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"lm_eval is not installed: pip install 'fedray\[lm-eval\]'"):
        fedray.lm_eval(run, "letters", method="reft")
