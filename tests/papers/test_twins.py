"""The kits' twins on public data have their kit's protocol, a short run learns, and a second command makes a table."""

import re
import shlex
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedray.cli.app import app
from fedray.config import Config, load_config
from fedray.data.examples import assemble
from fedray.data.subsample import subsample
from fedray.evaluation.metrics.extracted_match import ExtractedMatch
from fedray.models.tokenizer import load_tokenizer
from fedray.results.run_result import RunResult

ROOT = Path(__file__).parents[2]
PAPERS = ROOT / "jobs" / "papers"

BOTH = {("aggregated", "test"), ("personalised", "test")}
TASKS = {"boolq", "openbookqa", "arc_easy", "arc_challenge"}
UNSEEN = {"unseen_openbookqa", "unseen_clinc150_domain"}
SHORT_TASKS = TASKS | {"snips_intent", "banking77_intent", "clinc150_intent", "clinc150_domain"}


@dataclass(frozen=True)
class Twin:
    """A twin, and what a short run of it measures.

    Attributes:
        kit: whose protocol it has.
        short: what makes a run short; methods and protocol stay.
        measured: moments and examples, all of them.
        metrics: labels.
        groups: named test sets and tasks with a score of their own.
        own: fields of the protocol that differ from the kit's.
    """

    kit: str
    short: tuple[str, ...]
    measured: Set[tuple[str, str]]
    metrics: Set[str]
    groups: Set[str] = frozenset()
    own: Set[str] = frozenset()


COMMONSENSE = {"after_phrase_match", "first_label_match", "perplexity"}
REFT = "{name: fedavg, label: fedavg_reft, adapter: reft}"
FEW = ("data.max_examples=60", "data.max_test_examples=16")
SMALL = tuple(f"model.config.{size}" for size in ("hidden_size=32", "intermediate_size=32", "num_hidden_layers=1"))
"""Of a random Llama."""
TEN_STEPS = ("rounds=3", "data.max_examples=400", "data.max_length=48", "clients.per_round=4", "train.lr=3e-2")
"""In every round, for ten clients."""
TWINS = {
    "k0_twin": Twin(
        "k0_reft_commonsense",
        ("train.epochs=3", *FEW, *SMALL),
        BOTH,
        COMMONSENSE,
        groups={"boolq", "openbookqa", "ARC-Easy", "ARC-Challenge"},
    ),
    "k1_twin": Twin(
        "k1_reft_commonsense",
        (f"method=[{{name: local, adapter: reft}}, {REFT}]", *FEW, *SMALL),
        BOTH,
        COMMONSENSE,
        groups=TASKS,
    ),
    "k2_twin": Twin(
        "k2_reft_maths",
        (f"method=[{{name: local, adapter: reft}}, {REFT}, fedreft]", "rounds=2", "train.epochs=1", *FEW, *SMALL),
        BOTH,
        {"maths_match", "perplexity"},
        groups={"gsm8k", "arc_easy", "openbookqa"},
    ),
    "k3_twin": Twin(
        "k3_gsm8k_8b",
        ("method=[fedavg, fedsa_lora]", "rounds=2", "train.max_steps=10", *FEW, "data.max_test_examples=6", *SMALL),
        BOTH,
        {"answer_is_match", "perplexity"},
    ),
    "k4_twin": Twin(
        "k4_glue_skew",
        ("method=[local, fedavg]", "rounds=2", "train.max_steps=6", *FEW, "data.max_validation_examples=16"),
        BOTH,
        {"accuracy"},
    ),
    "k5_twin": Twin(
        "k5_flan8",
        ("method=[local, fedalt]", "rounds=2", "train.epochs=2", "evaluation.every=0", *SMALL),
        BOTH,
        {"rouge1", "rougeL"},
    ),
    "k6_twin": Twin(
        "k6_feddpa",
        ("method=[local, feddpa]", "rounds=2", "train.epochs=2", *SMALL),
        BOTH | {("aggregated", "common")},
        {"rouge1_unstemmed", "rougeLsum_unstemmed"},
        groups=SHORT_TASKS,
    ),
    "k7_twin": Twin(
        "k7_fedhft_glue",
        (
            "method=[local, fedit, {name: fedhft, clusters: 2, warmup_rounds: 1}]",
            "rounds=2",
            "clients.count=4",
            "evaluation.every=0",
            "data.max_examples=70",
            "data.max_test_examples=35",
        ),
        BOTH,
        {"accuracy"},
        own={"methods", "metrics"},
    ),
    "k8_twin": Twin(
        "k8_openfed",
        ("method=[fedavg, scaffold]", "evaluation.every=0", "data.max_test_examples=8", *TEN_STEPS, *SMALL),
        {("server", "common"), ("personalised", "common")},
        {"rougeL", "perplexity"},
    ),
    "k10_twin": Twin(
        "k10_fedllm_bench",
        ("method=[local, fedavg]", *TEN_STEPS, *SMALL),
        BOTH,
        {"rouge_l", "perplexity"},
    ),
    "k11_twin": Twin(
        "k11_ni_zeroshot",
        ("method=[fedavg]", "rounds=4", "evaluation.every=1", "data.max_test_examples=64", *SMALL),
        {("server", "common")},
        {"rouge_l", "perplexity"},
        groups=SHORT_TASKS - {"openbookqa", "clinc150_domain"} | UNSEEN,
    ),
}


def protocol(config: Config) -> dict[str, Any]:
    """Return what a twin has of its kit, whatever the sizes of data, model and budget."""
    train, evaluation = config.train, config.evaluation
    fields = ("optimizer", "clip", "schedule", "schedule_over", "round_schedule", "round_decay", "warmup_steps")
    return {
        "methods": [entry.key for entry in config.method],
        "metrics": {metric.label for metric in evaluation.metrics},
        "generation": evaluation.generation,
        "common": evaluation.common,
        "head": config.head,
        "reft": config.reft,
        "dropout": config.lora.dropout,
        "scale": config.lora.alpha / config.lora.rank,
        "some clients": config.clients.per_round is not None,
        **{field: getattr(train, field) for field in fields},
    }


def test_every_kit_has_a_twin() -> None:
    """K9's is a count of bytes (test_bytes.py). Every twin has a file, and those of K0 and K10 stand for two kits."""
    assert {path.stem for path in PAPERS.glob("*_twin.yaml")} == TWINS.keys()
    numbers = {int(re.match(r"k(\d+)", path.stem)[1]) for path in PAPERS.glob("k*.yaml")}  # type: ignore[index]
    assert numbers == {int(name[1:].partition("_")[0]) for name in TWINS} | {9}


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_has_the_protocol_of_its_kit(name: str) -> None:
    twin = TWINS[name]
    theirs, ours = (protocol(load_config(PAPERS / f"{stem}.yaml")) for stem in (twin.kit, name))
    assert {field for field in theirs if theirs[field] != ours[field]} - {"metrics"} == twin.own - {"metrics"}
    assert "metrics" in twin.own or ours["metrics"] >= theirs["metrics"]
    assert set(ours["methods"]) - {"fedhft_1", "fedhft_2"} <= set(theirs["methods"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "cut"), [("k0_twin", True), ("k1_twin", True), ("k2_twin", False), ("k3_twin", False)]
)
def test_gold_answers_of_a_twin_are_right(
    name: str, cut: bool, shared_data: Path, minilm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a perfect model generates, through the twin's tokenizer, scores 100 %; those of the commonsense tasks also
    within `max_new_tokens`. Solutions of GSM8K are longer than what a twin generates."""
    monkeypatch.chdir(ROOT)
    config = load_config(PAPERS / f"{name}.yaml")
    tokenizer = load_tokenizer(config.model)
    rows = assemble(list(config.data.load(config.task, config.seed, config.clients.count)), config.data, config.task)
    examples = subsample(rows, config.data, config.seed)
    references = [str(text) for text in examples.field("answer")[examples.field("split") == "test"]]
    tokens = tokenizer(references, add_special_tokens=False)["input_ids"]
    most = config.evaluation.max_new_tokens if name in ("k0_twin", "k1_twin") else None
    texts = [tokenizer.decode(ids[:most], skip_special_tokens=True) for ids in tokens]
    rules = [metric for metric in config.evaluation.metrics if isinstance(metric, ExtractedMatch)]
    assert rules
    assert {metric.label: metric.compute(texts, references) for metric in rules} == dict.fromkeys(
        (metric.label for metric in rules), 1.0
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", TWINS)
def test_a_short_run_of_a_twin_learns(
    name: str, shared_data: Path, minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its losses fall, and it measures what its kit measures; the header's second command then makes a table with
    intervals. K4's and K7's encoder is pretrained: after local training its accuracy is above twice that of guessing,
    1/7."""
    monkeypatch.chdir(ROOT)
    twin = TWINS[name]
    path, output = f"jobs/papers/{name}.yaml", str(tmp_path / "run")
    run = ["run", path, *twin.short, "runtime=inline", f"data.cache_dir={tmp_path}", "--output", output]
    ended: Any = CliRunner().invoke(app, run)
    assert ended.exit_code == 0, ended.output
    result = RunResult.load(output)
    by_method = result.rounds().groupby("method", sort=False)["train_loss"]
    assert (by_method.last() < by_method.first()).all(), by_method.agg(["first", "last"])
    final = result.evaluations().query("phase == 'final' and examples != 'validation'")
    assert set(zip(final["moment"], final["examples"], strict=True)) == twin.measured
    assert set(final["metric"]) == twin.metrics
    assert set(final["group"]) == {"", *twin.groups}
    if name in ("k4_twin", "k7_twin"):
        scores = result.scores().query("moment == 'personalised' and examples == 'test' and group == ''")
        assert (scores["mean"] > 2 / 7).all(), scores
    if name == "k11_twin":
        check_transfer(result)
    if found := re.search(
        rf"^#   fedray (compare) runs/{name}( .*)$", (PAPERS / f"{name}.yaml").read_text(), re.MULTILINE
    ):
        table: Any = CliRunner().invoke(app, ["compare", output, *shlex.split(found[2])])
        assert table.exit_code == 0, table.output
        assert "\\begin{tabular}" in table.output
        assert re.search(r"& \[\S+, \S+\] &", table.output), table.output


def check_transfer(result: RunResult) -> None:
    """The server's model learns the tasks that clients have, and what those share with the tasks that no client has."""
    scores = result.evaluations().query("moment == 'server' and metric == 'perplexity' and group != ''")
    by_task = scores.pivot(index="group", columns=["phase", "server_round"], values="value")
    first, last = by_task["train"].iloc[:, 0], by_task["final"].iloc[:, 0]
    assert (last < first).all(), by_task
