"""Kit K0: with one client, fedray is central pyreft. docs/papers.md says what is compared and what differs."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import central_reft as central
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import fedray
from fedray.adapters.reft import attach_reft
from fedray.config import load_config
from fedray.evaluation.evaluate import generate
from fedray.evaluation.losses import num_units, prompts
from fedray.experiment.prepare import Prepared, prepare
from fedray.randomness import keyed_rng
from fedray.training.base_model import load_base_model

SEED, LAYERS = 5, 2
MODEL = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
TRAIN, TEST = 22, 6
"""Rows: the last batch of an epoch is not full."""

Rows = list[dict[str, str]]
CASES = [
    ("generated", "relative", True),
    ("generated", "relative", False),
    ("generated", "absolute", True),
    ("generated", "absolute", False),
    ("boolq", "relative", True),
    ("boolq", "relative", False),
]
"""Text, `reft.rotation` and `reft.tie_positions`."""


def generated_rows() -> Rows:
    """Questions in the layout of LLM-Adapters; every other one is too short for f7+l7."""
    rng, rows = np.random.default_rng(0), []
    for number in range(TRAIN + TEST):
        a, b = rng.permutation(12)[:2]
        question = f"is {NUMBERS[a]} more than {NUMBERS[b]}?"
        if number % 2:
            question = f"Please answer the following question with true or false, question: {question}"
        answer = "true" if a > b else "false"
        output = f"the correct answer is {answer}"
        rows.append({"instruction": question, "input": "", "output": output, "answer": answer})
    return rows


@dataclass
class Kit:
    """The same experiment for both: `fedray.run` with one client, and pyreft.

    Attributes:
        folder: an empty one.
        reft: fields of the section.
        train: fields of the section.
    """

    folder: Path
    rows: Rows
    reft: dict[str, Any]
    train: dict[str, Any]
    rounds: int = 1

    def __post_init__(self) -> None:
        for name, rows in (("train", self.rows[:TRAIN]), ("test", self.rows[TRAIN:])):
            (self.folder / f"{name}.json").write_text(json.dumps(rows))
        texts = [row["instruction"] + "\n" + row["output"] for row in self.rows]
        self.tokenizer = central.llama_like_tokenizer(texts, self.folder / "tokenizer")

    @cached_property
    def experiment(self) -> dict[str, Any]:
        engine = {"class": "step_losses.StepLosses", "path": str(self.folder / "losses")}
        return {
            "rounds": self.rounds,
            "seed": SEED,
            "method": [{"name": "fedavg", "adapter": "reft"}],
            "task": "causal_lm",
            "model": {"path": "random", "tokenizer": str(self.folder / "tokenizer"), "config": MODEL},
            "data": {
                "source": "files",
                "files": {name: str(self.folder / f"{name}.json") for name in ("train", "test")},
                "prompt": "{instruction}\n",
                "answer": "{output}",
                "max_length": 512,
                "cache_dir": str(self.folder / "cache"),
            },
            "partition": {"kind": "iid", "validation_fraction": 0},
            "clients": {"count": 1, "tiers": {"all": {"share": 1.0, "engine": engine}}},
            "reft": {"rank": 4, "positions": "f7+l7", "short_prompts": "halves", **self.reft},
            "train": {"batch_size": 4, "lr": 9e-3, "schedule": "linear", "schedule_over": "run", **self.train},
            "evaluation": {"every": 0, "metric": {"name": "extracted_match", "rule": "first_label"}},
            "device": "cpu",
            "runtime": "inline",
        }

    @cached_property
    def prepared(self) -> Prepared:
        return prepare(load_config(self.experiment))

    @property
    def table(self) -> Any:
        return self.shard.tables["train"]

    @property
    def shard(self) -> Any:
        (shard,) = self.prepared.data.shards.values()
        return shard

    @property
    def tied(self) -> bool:
        return bool(self.prepared.config.reft.tie_positions)

    def base_model(self) -> Any:
        config = self.prepared.config
        return load_base_model(config, self.prepared.architecture, "all", config.clients.tier("all"), "cpu")

    @cached_property
    def adapter(self) -> Any:
        """fedray's, with the first values of the run."""
        return attach_reft(self.base_model(), self.prepared.config.reft, seed=SEED)

    @cached_property
    def first(self) -> Any:
        return self.adapter.read("reft")

    def federated(self) -> tuple[list[float], Any]:
        """Run fedray; return the losses of every step, and the trained values."""
        run = fedray.run(self.experiment, output=self.folder / "run")
        (client_steps,) = set(run.clients().query("phase == 'train'")["steps"])
        losses = [float(line) for line in (self.folder / "losses").read_text().split()]
        state = load_file(next(run.path.rglob("server.safetensors")))
        return losses[: client_steps * self.rounds], state["0"]

    def dataset(self, split: str) -> Any:
        """pyreft's data set of the train or test rows."""
        own = self.rows[:TRAIN] if split == "train" else self.rows[TRAIN:]
        told = [{"instruction": row["instruction"] + "\n", "output": row["output"]} for row in own]
        return central.raw_dataset(self.tokenizer, told, split, self.tied, LAYERS)

    def order(self, dataset: Any) -> list[central.Order]:
        """Return fedray's batches of every epoch as rows of pyreft's data set, whose tokens and labels are the same."""
        theirs = {tuple(ids[1:].tolist()): row for row, ids in enumerate(dataset.input_ids)}  # without pyreft's sink
        rows = [theirs[tuple(ids)] for ids in self.table["input_ids"].to_pylist()]
        for row, labels in zip(rows, self.table["labels"].to_pylist(), strict=True):
            assert dataset.labels[row][1:].tolist() == labels
        assert sorted(rows) == list(range(TRAIN))
        train, found = self.prepared.config.train, []
        for server_round in range(self.rounds):
            for epoch in range(int(train.epochs)):
                order = keyed_rng(SEED, "order", server_round, self.shard.client, epoch).permutation(TRAIN)
                cuts = range(0, TRAIN, train.batch_size)
                found.append([[rows[i] for i in order[start : start + train.batch_size]] for start in cuts])
        return found

    def central(self, rotation: central.Coordinates = "pyreft") -> tuple[list[float], "central.Central"]:
        """Train with pyreft; return the losses of every micro-batch and the trained model."""
        theirs = central.Central(self.base_model(), self.adapter.layout("reft"), self.first, rotation)
        np.testing.assert_allclose(theirs.vector(), self.first, atol=1e-6)
        dataset, train = self.dataset("train"), self.prepared.config.train
        losses = theirs.train(
            dataset,
            self.tokenizer,
            self.order(dataset),
            self.folder / "trainer",
            learning_rate=train.lr,
            lr_scheduler_type=train.schedule,
            warmup_steps=train.warmup_steps,
            gradient_accumulation_steps=train.accumulation,
            optim="sgd" if train.optimizer == "sgd" else "adamw_torch",
            max_grad_norm=train.clip or 0.0,
            weight_decay=0.0,
        )
        return losses, theirs

    def texts(self, vector: Any) -> list[str]:
        """Return what fedray generates with these values, in the order of pyreft's data set."""
        self.adapter.load("reft", vector)
        table, data = self.shard.tables["test"], self.prepared.data
        found = generate(self.adapter.model, table, self.tokenizer, 4, data.pad_token_id, "cpu", 12, data.end_token_ids)
        by_prompt = dict(zip((tuple(ids.tolist()) for ids in prompts(table)), found, strict=True))
        return [by_prompt[tuple(ids[1:].tolist())] for ids in self.dataset("test").input_ids]


@pytest.fixture
def kit(tmp_path: Path) -> Any:
    """kit(rows, reft, rounds, **train)."""

    def build(rows: Rows, reft: dict[str, Any], rounds: int = 1, **train: Any) -> Kit:
        return Kit(tmp_path, rows, reft, train, rounds)

    return build


def moved(kit: Kit, ours: Any, theirs: Any) -> float:
    """‖ours − theirs‖ as a share of how far training moved the values."""
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs - kit.first))


@pytest.mark.parametrize(("text", "rotation", "tied"), CASES)
def test_it_is_pyrefts_trainer(kit: Any, text: str, rotation: Any, tied: bool, request: pytest.FixtureRequest) -> None:
    """AdamW, 10 % warm-up, clipping at 1, three epochs; with `relative`, pyreft's modules are as it made them."""
    rows = generated_rows()
    if text == "boolq":
        file = request.getfixturevalue("shared_data") / "llm_adapters" / "boolq" / "train.json"
        rows = json.loads(file.read_text())[: TRAIN + TEST]
    both = kit(rows, {"tie_positions": tied, "rotation": rotation}, epochs=3, warmup_steps=0.1)
    losses, values = both.federated()
    expected, theirs = both.central(rotation)
    assert len(losses) == len(expected) == 18
    np.testing.assert_allclose(losses, expected, rtol=2e-6)
    assert losses[-1] < losses[0] - 0.2
    assert moved(both, values, theirs.vector()) < 1e-5
    texts = both.texts(values)
    assert texts == theirs.generate(both.dataset("test"), both.tokenizer, 4, 12)
    assert texts != both.texts(both.first)


def test_what_pyreft_draws_is_not_repeatable(kit: Any) -> None:
    """Trainings of pyreft differ by the columns that it draws for B. fedray's `relative` is one more such draw, and
    its `absolute` further away. The first two losses are equal: the first step of the warm-up has rate 0."""
    both = kit(generated_rows(), {"tie_positions": True, "rotation": "relative"}, epochs=6, warmup_steps=0.1)
    found: dict[Any, Any] = {name: both.central(name) for name in ("relative", "absolute")}
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        found[seed] = both.central()
    values = {name: trained.vector() for name, (_, trained) in found.items()}
    for losses, _ in found.values():
        np.testing.assert_allclose(losses[:2], found[1][0][:2], rtol=1e-6)
    draws = [moved(both, values[a], values[b]) for a, b in ((1, 2), (1, 3), (2, 3))]
    ours = [moved(both, values["relative"], values[seed]) for seed in (1, 2, 3)]
    others = [moved(both, values["absolute"], values[seed]) for seed in (1, 2, 3)]
    assert min(draws) > 0.1
    assert max(ours) < 1.25 * max(draws) < min(others)


def test_accumulated_batches_with_equally_long_answers(kit: Any) -> None:
    """pyreft takes the mean of the micro-batches' means: the same as fedray's mean over all answer tokens."""
    rows = [{**row, "output": "the correct answer is true", "answer": "true"} for row in generated_rows()]
    both = kit(rows, {"tie_positions": True, "rotation": "relative"}, epochs=2, batch_size=11, accumulation=2)
    losses, values = both.federated()
    expected, theirs = both.central("relative")
    np.testing.assert_allclose(losses, np.reshape(expected, (-1, 2)).mean(1), rtol=2e-6)
    assert moved(both, values, theirs.vector()) < 1e-5


def test_accumulated_batches_with_answers_of_different_lengths(kit: Any) -> None:
    """In fedray every answer token counts alike, in pyreft every micro-batch: (n₁ l₁ + n₂ l₂) / (n₁ + n₂) against
    (l₁ + l₂) / 2."""
    rows = [{**row, "output": row["output"] * (1 + number % 3)} for number, row in enumerate(generated_rows())]
    both = kit(rows, {"tie_positions": True}, epochs=1, batch_size=11, accumulation=2, optimizer="sgd", clip=None)
    (loss,), values = both.federated()
    (first, second), theirs = both.central("absolute")
    dataset = both.dataset("train")
    counts = [sum(int((dataset.labels[row] >= 0).sum()) for row in batch) for batch in both.order(dataset)[0]]
    assert sum(counts) == num_units(both.table, "causal_lm").sum()
    assert loss == pytest.approx(np.average([first, second], weights=counts), rel=1e-6)
    assert abs(loss - (first + second) / 2) > 1e-3
    assert moved(both, values, theirs.vector()) > 1e-2


@pytest.mark.parametrize("kind", ["noreft", "loreft"])
def test_rounds_are_epochs_of_one_training(kit: Any, kind: str) -> None:
    """Without moments that start afresh: three rounds of SGD under one schedule are three epochs of pyreft's.

    R begins every round in new coordinates. They are the same ones until a reflection's vector has become longer than
    1, which LAPACK does not give; then R moves on at another speed.
    """
    both = kit(
        generated_rows(),
        {"tie_positions": True, "kind": kind},
        rounds=3,
        optimizer="sgd",
        lr=0.3,
        warmup_steps=0.1,
        clip=None,
    )
    losses, values = both.federated()
    expected, theirs = both.central("absolute")
    assert len(losses) == len(expected) == 18
    same = len(losses) if kind == "noreft" else 7  # the first loss of a round depends on no step in it
    np.testing.assert_allclose(losses[:same], expected[:same], rtol=2e-6)
    assert (moved(both, values, theirs.vector()) < 1e-4) == (kind == "noreft")


def test_pyrefts_own_data_sets_leave_out_the_last_token(kit: Any) -> None:
    """The class for Alpaca's columns counts positions up to the last but one token of a prompt; the class for raw
    texts, and the paper's own scripts, up to the last one, as fedray does. Both put one token of padding in front."""
    both = kit(generated_rows(), {"tie_positions": True})
    raw = both.dataset("train")
    fields = {"input_field": "input", "instruction_field": "instruction", "output_field": "output"}
    alpaca = central.pyreft.ReftSupervisedDataset(
        "any",
        None,
        both.tokenizer,
        dataset=both.rows[:TRAIN],
        position="f7+l7",
        num_interventions=LAYERS,
        share_weights=True,
        **fields,
    )
    for dataset, last in ((raw, 0), (alpaca, -1)):
        for row in range(TRAIN):
            example = dataset[row]
            length = int((example["labels"][1:] == -100).sum())
            assert max(example["intervention_locations"][0]) == length + last
            assert example["input_ids"][0] == both.tokenizer.pad_token_id
