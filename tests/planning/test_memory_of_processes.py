"""The predicted bytes against what a process takes, and what belongs to the bare process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from random_texts import write_clients
from tiny import tiny_bert
from torch import nn

from fedray.adapters.adapter import Adapter
from fedray.config import Config, load_config
from fedray.evaluation.metrics.accuracy import Accuracy
from fedray.federation.tasks import WorkerSetup
from fedray.federation.worker import Worker
from fedray.methods.fedavg import FedAvg
from fedray.models.architecture import architecture


def tiny_config(methods: list[str]) -> Config:
    fields = {"rounds": 1, "method": methods, "data": {"source": "synthetic"}, "device": "cpu"}
    return load_config({**fields, "model": tiny_bert()})


LIBRARY = """
import mmap
DATA = mmap.mmap(-1, {size}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for _ in range({size} // 10**6):
    DATA.write(b"x" * 10**6)
"""
"""Memory that no earlier test freed: a process that ran many of them would take it from there."""


def test_what_a_later_method_imports_belongs_to_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 MB that come when a worker's second method is attached for the first time, and stay."""
    size = 100_000_000
    modules: list[object] = []
    config = tiny_config(["local", "fedavg"])
    shape = architecture(config.model, "classification", 3, None, 0)
    local, fedavg = (WorkerSetup(config, entry, shape, ("a", "b", "c"), 0) for entry in config.method)
    worker, attach, found = Worker(), FedAvg.attach, dict[str, object]()

    def imports(method: FedAvg, model: nn.Module) -> Adapter:
        if not modules:
            exec(LIBRARY.format(size=size), found)
        modules.append(found)
        return attach(method, model)

    worker.setup(local)
    before = worker.memory()
    monkeypatch.setattr(FedAvg, "attach", imports)
    worker.setup(fedavg)
    after = worker.memory()
    assert len(modules) > 1
    assert after.host_baseline - before.host_baseline == pytest.approx(size, rel=0.2)
    assert after.host_peak < size / 2


def test_what_a_metric_imports_belongs_to_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library of 100 MB that only `compute` needs. What was left in cycles before does not count, whenever the
    garbage collector comes."""
    size = 100_000_000
    (tmp_path / "large_library.py").write_text(LIBRARY.format(size=size))
    monkeypatch.syspath_prepend(tmp_path)
    config = tiny_config(["local"])
    shape = architecture(config.model, "classification", 3, None, 0)
    worker, found = Worker(), []
    for libraries in ((), ("large_library",)):
        monkeypatch.setattr(Accuracy, "libraries", libraries)
        cycle: list[object] = [torch.ones(size // 4)]
        cycle.append(cycle)
        del cycle
        worker.setup(WorkerSetup(config, config.method[0], shape, ("a", "b", "c"), 0))
        found.append(worker.memory().host_baseline)
    assert found[1] - found[0] == pytest.approx(size, rel=0.2)


MEASURED = """
import json, sys
from fedray.config import load_config
from fedray.experiment.prepare import prepare
from fedray.federation.tasks import ClientTask, downlinks_of
from fedray.federation.worker import Worker

config = load_config(json.loads(sys.argv[1]))
prepared, (entry,) = prepare(config), config.method
worker = Worker()
worker.setup(prepared.worker_setups(entry)["default"])
federation = prepared.federation(entry, worker.initial(), None)
downlinks = downlinks_of(federation.method.configure_train(federation.server, prepared.clients), prepared.clients)
for server_round in range(2):
    for client in prepared.clients:
        shard = prepared.data.shards[client.id]
        worker.train(ClientTask(client, server_round, downlinks[client.id], True, shard=shard))
print(json.dumps([prepared.footprint(entry, "default").host(False), worker.memory().host_peak]))
"""
SIZES = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "max_position_embeddings": 200}
BERT = {"model_type": "bert", "intermediate_size": 1024} | SIZES
LLAMA = {"model_type": "llama", "intermediate_size": 688, "num_key_value_heads": 2} | SIZES
LARGE = {"vocab_size": 32_000}
SHORT, LONG = (2, 2), (60, 60)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "model", "adapter", "answer", "train", "evaluation"),
    [
        ("classification", BERT, "lora", SHORT, 14, {"batch_size": 4}),
        ("classification", LLAMA, "full", SHORT, 14, {"batch_size": 4}),
        ("causal_lm", LLAMA, "lora", LONG, 1, {"batch_size": 64}),
        ("causal_lm", LLAMA, "full", SHORT, 2, {"batch_size": 2, "metric": "rouge_l", "max_new_tokens": 30}),
        ("causal_lm", LLAMA | LARGE, "lora", LONG, 1, {"batch_size": 64}),
        ("causal_lm", LLAMA | LARGE, "full", LONG, 4, {"batch_size": 4}),
    ],
)
def test_a_process_takes_what_was_predicted_within_a_quarter(
    task: str,
    model: dict[str, Any],
    adapter: str,
    answer: tuple[int, int],
    train: int,
    evaluation: dict[str, Any],
    tmp_path: Path,
) -> None:
    """What a process of its own takes that trains and evaluates two clients, beyond what it had before its model. glibc
    gives freed memory back at once: what it would keep otherwise, nothing predicts."""
    write_clients(tmp_path, task, (90, 120), answer)
    config = {
        "rounds": 1,
        "task": task,
        "method": {"name": "fedavg", "adapter": adapter},
        "model": {"path": "random", "tokenizer": "bytes", "config": model},
        "data": {
            "source": "files",
            "files": {"train": str(tmp_path / "*.jsonl")},
            "max_length": 180,
            "cache_dir": str(tmp_path / "cache"),
        },
        "partition": {"kind": "by_file"},
        "train": {"batch_size": train},
        "evaluation": evaluation,
        "device": "cpu",
        "runtime": "inline",
    }
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, json.dumps(config)],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    predicted, measured = json.loads(done.stdout.splitlines()[-1])
    print(f"{predicted / 1e6:.0f} MB predicted, {measured / 1e6:.0f} MB measured")
    assert measured > 40e6
    assert abs(predicted / measured - 1) < 0.25
