"""Tries families of models, tiny and random, as a user would run them, and writes what was seen into docs/models.md.

    python tests/helpers/family_sweep.py                  every family; what was seen, line by line
    python tests/helpers/family_sweep.py gpt2 --write     these families' lines are replaced in the page

A family is saved as transformers saves it and goes through fedray's own loading, preparation and training, as a
language model and as a classifier:

- It must not read later tokens or padding (`fedray.models.checks`).
- Its loss is that of the logits of transformers' own class, which reads one text at a time without padding.
- The loss of every method falls within a few steps, on every client, and every LoRA layer has a part in it.
- Clients trained in one step have the results that they have one by one.
- The trained model has the same loss at evaluation batch sizes of 1 and 32.

Where a family cannot be right it must be refused with a message of fedray's. Everything else is an AssertionError.
"""

import argparse
import logging
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import transformers
from families import NAMES, NOT_BUILT, TASKS, tiny_base, tiny_family
from torch.nn import functional
from transformers import AutoConfig

from fedray.config import MethodConfig, load_config
from fedray.data.load import load_federated_data
from fedray.data.shards import FederatedData, Shard
from fedray.errors import ConfigError, TrainingError
from fedray.evaluation.evaluate import evaluate
from fedray.evaluation.metrics import configured_metric
from fedray.experiment.prepare import Prepared, prepare
from fedray.federation.local_pool import LocalPool
from fedray.federation.tasks import ClientResult, ClientTask, downlinks_of
from fedray.federation.worker import Worker
from fedray.models.checks import reads_left_padding
from fedray.models.load_options import LoadOptions
from fedray.storage.paths import StoragePath
from fedray.types import Moment, Task

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"
HEADER = (
    "| model type | language model | classifier | LoRA's layers | LoReFT |",
    "|---|---|---|---|---|",
)

FAST = ("bert", "deberta-v2", "distilbert", "gpt2", "llama", "mamba", "mixtral", "phi3", "roberta", "t5")
"""The families of `make test`: those that are used most, and one of each kind."""

METHODS: dict[str, list[dict[str, Any]]] = {
    "full": [{"name": "fedavg", "adapter": "full", "train": {"lr": 1e-3}}],
    "lora": [
        {"name": "fedavg"},
        {"name": "local"},
        {"name": "head_only"},
        {"name": "fedalt"},
        {"name": "fedhft", "warmup_rounds": 1, "importance": "fisher"},
        {"name": "fedhft", "label": "fedhft-pre", "timing": "pre", "warmup_rounds": 1},
    ],
    "reft": [{"name": "fedreft"}, {"name": "fedavg", "adapter": "reft"}],
}
"""By the adapter that they train."""

NAMED_TARGETS = {"xlnet": ["layer_1"]}
"""LoRA's targets where a family has no default ones and some can be named."""

IDLE = ("compressor", "longformer.encoder.layer.1.")
"""Parts of the names of layers without a gradient here: only longer texts reach DeepSeek-V4's compressors, and
Longformer's head reads the first token alone, whose attention in the last block is the global one."""

CLASSES = ("animals", "food", "music")
CLIENTS = ("client_000", "client_001")


@dataclass(frozen=True)
class Row:
    """What was seen of one family: a line of the page's table.

    Attributes:
        tasks: as a language model and as a classifier.
        lora: the layers that have a LoRA by default, or why there are none.
        reft: `yes`, or why not.
    """

    family: str
    tasks: Mapping[Task, str]
    lora: str
    reft: str

    def line(self) -> str:
        return f"| {' | '.join((f'`{self.family}`', *self.tasks.values(), self.lora, self.reft))} |"


def families() -> list[str]:
    """Return the families of the sweep: all of transformers' that tests/helpers/families.py can build."""
    every = set(NAMES["causal_lm"]) | set(NAMES["classification"])
    return sorted(every - set(NOT_BUILT))


def sweep(family: str, folder: Path) -> Row:
    """Return what is seen of a family.

    Raises:
        AssertionError: a wrong number, or a failure that no message of fedray's explains.
    """
    seen = {task: _Trial(family, task, folder / task).run() for task in TASKS if _serves(family, task)}
    return Row(
        family,
        {task: seen[task]["task"] if task in seen else "" for task in TASKS},
        *(next((one[kind] for one in seen.values() if kind in one), "") for kind in ("lora", "reft")),
    )


def _serves(family: str, task: Task) -> bool:
    """A classifier that transformers does not have is one of fedray's own."""
    return task == "classification" or family in NAMES[task]


@dataclass(frozen=True)
class _Trial:
    """One family for one task."""

    family: str
    task: Task
    folder: Path

    def run(self) -> dict[str, str]:
        """Return what was seen: of the task, of LoRA and of ReFT."""
        own = self.family in NAMES[self.task]
        model = tiny_family(self.family, self.task, spread=0.1) if own else tiny_base(self.family, spread=0.1)
        model.config.id2label = dict(enumerate(CLASSES))  # its head is trained on the data's classes
        model.config.label2id = {name: index for index, name in enumerate(CLASSES)}
        model.save_pretrained(self.folder / "model")
        try:
            prepared = self._prepared("full")
            worker, _ = self._started(prepared, prepared.config.method[0])
        except ConfigError as error:
            return {"task": f"refused: {_reason(error)}"}
        if own:
            self._compare_loss(prepared, worker)
        assert self._train(prepared) == "one by one"  # the whole model trains
        seen = {"task": "yes", "lora": self._adapted("lora"), "reft": self._adapted("reft")}
        if reads_left_padding(worker.adapter.model):
            seen["task"] += "; generates one prompt at a time"
        return seen

    def _adapted(self, kind: str) -> str:
        """Train with every method of an adapter; return the cell of the table."""
        for targets in ((), NAMED_TARGETS.get(self.family)):
            if targets is None:
                break
            try:
                prepared = self._prepared(kind, targets)
                together = self._train(prepared)
            except (ConfigError, TrainingError) as error:
                refusal = f"refused: {_reason(error)}"
                continue
            cell = "yes" if kind == "reft" else self._targets(prepared)
            return cell + ("" if together == "together" else "; clients one by one")
        return refusal

    def _targets(self, prepared: Prepared) -> str:
        worker, _ = self._started(prepared, prepared.config.method[0])
        return ", ".join(sorted({f"`{path.rpartition('.')[2]}`" for path in worker.adapter.targets}))

    def _prepared(self, kind: str, targets: Sequence[str] = ()) -> Prepared:
        methods = [entry for entry in METHODS[kind] if self.task != "causal_lm" or entry["name"] != "head_only"]
        config = load_config(
            {
                "rounds": 4,
                "seed": 3,
                "task": self.task,
                "method": methods,
                "model": {"path": str(self.folder / "model"), "tokenizer": "bytes"},
                "data": {
                    "source": "synthetic",
                    "classes": len(CLASSES),
                    "examples_per_client": 10,
                    "max_length": 22,  # no multiple of anything that texts are padded to
                    "cache_dir": str(self.folder / "cache"),
                },
                "partition": {"kind": "by_file"},
                "clients": {"count": len(CLIENTS)},
                "lora": {"rank": 2, "alpha": 8.0, "dropout": 0.1, "targets": targets},
                "reft": {"rank": 2},
                "train": {"batch_size": 2, "accumulation": 4, "max_steps": 3, "epochs": 3, "lr": 3e-3, "eps": 1e-5},
                "evaluation": {"every": 0},
                "device": "cpu",
                "runtime": "inline",
            }
        )
        return prepare(config, lambda config, tokenizer: _on_training_data(load_federated_data(config, tokenizer)))

    def _started(self, prepared: Prepared, entry: MethodConfig) -> tuple[Worker, list[ClientTask]]:
        """Return a worker with the method, and the clients' tasks in its first round."""
        states = self.folder / "run" / "states" / entry.key
        states.mkdir(parents=True, exist_ok=True)
        pool = LocalPool(prepared.data.shards)
        initial = pool.setup(prepared.worker_setups(entry, StoragePath.of(self.folder / "run")))
        federation = prepared.federation(entry, initial, pool)
        downlinks = downlinks_of(
            federation.method.configure_train(federation.server, prepared.clients), prepared.clients
        )
        tasks = [
            ClientTask(client, 0, downlinks[client.id], True, keep="adapter", shard=pool.shards[client.id])
            for client in prepared.clients
        ]
        return pool.workers["default"], tasks

    def _train(self, prepared: Prepared) -> str:
        """Train the clients of every method one by one and in one step; return whether the latter was possible."""
        modes = set()
        for entry in prepared.config.method:
            worker, tasks = self._started(prepared, entry)
            alone = [worker.train(task) for task in tasks]
            for result in alone:
                before, after = (result.report.evaluations[moment]["test"] for moment in get_args(Moment))
                assert after.loss < before.loss, f"{self}, {entry.key}: the loss does not fall"
            if entry.key == "fedavg" and worker.adapter.targets:
                adapter = alone[0].adapter or {}
                still = [path for path in worker.adapter.targets if not adapter[f"lora.{path}.B"].any()]
                still = [path for path in still if not any(part in path for part in IDLE)]
                assert not still, f"{self}: no gradient reaches {still}"
            self._compare_batch_sizes(prepared, worker, entry)
            with _Messages() as messages:
                together = list(worker.train_together(tasks))
            modes.add("one by one" if any("one by one" in message for message in messages.seen) else "together")
            for one, two in zip(alone, together, strict=True):
                self._compare_results(one, two, entry)
        return "one by one" if "one by one" in modes else "together"

    def _compare_results(self, alone: ClientResult, together: ClientResult, entry: MethodConfig) -> None:
        where = f"{self}, {entry.key}: one by one and in one step"
        assert alone.report.steps == together.report.steps == 3, where
        # Adam magnifies rounding where a gradient is nearly zero.
        _near(together.report.train_loss, alone.report.train_loss, where, tolerance=2e-3)
        one, two = ({m: found["test"].loss for m, found in r.report.evaluations.items()} for r in (alone, together))
        _near(two["aggregated"], one["aggregated"], where)
        _near(two["personalised"], one["personalised"], where, tolerance=2e-3)
        assert alone.adapter is not None
        assert together.adapter is not None
        first, second = (np.concatenate([v.reshape(-1) for v in r.adapter.values()]) for r in (alone, together))
        distance = np.linalg.norm(first - second) / np.linalg.norm(first)
        assert distance < 1e-2, f"{where}: the adapters differ by {distance:.1e}"

    def _compare_batch_sizes(self, prepared: Prepared, worker: Worker, entry: MethodConfig) -> None:
        table = prepared.data.shards[CLIENTS[0]].tables["test"]
        metric = configured_metric(prepared.config)
        one, many = (
            evaluate(worker.adapter.model, table, self.task, [metric], size, prepared.data.pad_token_id, "cpu").loss
            for size in (1, 32)
        )
        _near(many, one, f"{self}, {entry.key}: evaluation batch sizes 1 and 32")

    def _compare_loss(self, prepared: Prepared, worker: Worker) -> None:
        """Compare with the logits of transformers' own class."""
        arch = prepared.architecture
        if LoadOptions.of(arch).pooling != "head" and self.task != "causal_lm":
            return
        config = AutoConfig.from_pretrained(self.folder / "model")
        config.pad_token_id = prepared.data.pad_token_id
        if self.task == "causal_lm" and getattr(arch, "is_decoder", False):
            config.is_decoder = True
        model = TASKS[self.task].from_pretrained(self.folder / "model", config=config, dtype=torch.float32).eval()
        table = prepared.data.shards[CLIENTS[0]].tables["test"]
        losses = []
        with torch.no_grad():
            for row in table.to_pylist():
                logits, labels = model(input_ids=torch.tensor([row["input_ids"]])).logits, torch.tensor([row["labels"]])
                if self.task == "causal_lm":  # transformers' own losses of BART's kind do not shift
                    logits, labels = logits[0, :-1], labels[0, 1:]
                losses.append(functional.cross_entropy(logits, labels, reduction="none")[labels != -100])
        metric = configured_metric(prepared.config)
        ours = evaluate(worker.adapter.model, table, self.task, [metric], 4, prepared.data.pad_token_id, "cpu").loss
        _near(ours, float(torch.cat(losses).mean()), f"{self}: fedray's loss and transformers'")


class _Messages(logging.Handler):
    """Collects what fedray logs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(record.getMessage())

    def __enter__(self) -> "_Messages":
        logging.getLogger("fedray").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("fedray").removeHandler(self)


def _on_training_data(data: FederatedData) -> FederatedData:
    """Let clients test on what they train on, all of it in every step: that loss must fall."""
    shards = {
        id: Shard(id, {split: shard.tables["train"].slice(0, 7 - index) for split in shard.tables})
        for index, (id, shard) in enumerate(data.shards.items())
    }
    return replace(data, shards=shards)


def _near(ours: float, other: float, what: str, tolerance: float = 2e-4) -> None:
    assert abs(ours - other) <= tolerance * abs(other), f"{what}: losses {ours} and {other}"


def _reason(error: Exception) -> str:
    """Return a message's kind, short enough for a table."""
    text = str(error)
    for pattern, short in REASONS.items():
        if re.search(pattern, text):
            return short
    raise AssertionError(f"a failure without an explanation: {text}") from error


REASONS = {
    "reads the tokens after": "reads later tokens",
    "reads padding": "reads padding",
    "reads the other texts": "reads other texts",
    "draws random numbers": "draws random numbers in training",
    "no query and value layers are known": "name `lora.targets`",
    "no single list of blocks": "no list of blocks",
    "does not call .* as modules": "blocks are not called",
    "has an output of shape": "blocks give no vector per token",
}
"""What the refusals that are known say, and the page."""


def written(page: str, rows: Sequence[Row]) -> str:
    """Return the page with these rows in its table, instead of those of the same families."""
    before, _, rest = page.partition(BEGIN)
    table, _, after = rest.partition(END)
    lines = {line.split("`")[1]: line for line in table.splitlines() if line.startswith("| `")}
    lines |= {row.family: row.line() for row in rows}
    kept = [lines[family] for family in sorted(lines) if family in families()]
    others = [f"- `{family}`: {reason}" for family, reason in sorted(NOT_BUILT.items())]
    return "\n".join([before + BEGIN, *HEADER, *kept, "", "Not in the sweep:", "", *others, END + after])


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="*", help="default: every family")
    parser.add_argument("--write", action="store_true", help=f"replace the families' lines in {PAGE.name}")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    faults = 0
    for family in options.family or families():
        with tempfile.TemporaryDirectory() as folder:
            try:
                row = sweep(family, Path(folder))
            except Exception as error:
                faults += 1
                print(f"FAULT {family}: {type(error).__name__}: {' '.join(str(error).split())[:400]}", flush=True)
                continue
        print(row.line(), flush=True)
        if options.write:
            PAGE.write_text(written(PAGE.read_text("utf-8"), [row]), "utf-8")
    raise SystemExit(1 if faults else 0)


if __name__ == "__main__":
    main()
