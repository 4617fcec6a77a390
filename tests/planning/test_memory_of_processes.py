"""The predicted bytes against what a process takes, and what belongs to the bare process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
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
    assert after.host_peak - after.host_baseline < size / 2


def test_what_a_metric_imports_belongs_to_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library of 100 MB that only `compute` needs."""
    size = 100_000_000
    (tmp_path / "large_library.py").write_text(LIBRARY.format(size=size))
    monkeypatch.syspath_prepend(tmp_path)
    config = tiny_config(["local"])
    shape = architecture(config.model, "classification", 3, None, 0)
    worker, found = Worker(), []
    for libraries in ((), ("large_library",)):
        monkeypatch.setattr(Accuracy, "libraries", libraries)
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
worker, client = Worker(), prepared.clients[0]
worker.setup(prepared.worker_setups(entry)["default"])
federation = prepared.federation(entry, worker.initial(), None)
downlink = downlinks_of(federation.method.configure_train(federation.server, [client]), [client])[client.id]
worker.train(ClientTask(client, 0, downlink, True, shard=prepared.data.shards[client.id]))
use = worker.memory()
print(json.dumps([prepared.footprint(entry, "default").host(False), use.host_peak - use.host_baseline]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize(
    ("task", "model"),
    [
        ("classification", {"model_type": "bert", "intermediate_size": 1024}),
        ("classification", {"model_type": "llama", "intermediate_size": 688, "num_key_value_heads": 2}),
    ],
)
def test_a_process_takes_what_was_predicted_within_a_quarter(
    task: str, model: dict[str, Any], adapter: str, tmp_path: Path
) -> None:
    """PSS of a process of its own that trains some steps, beyond what it had before its model. glibc gives freed memory
    back at once: what it would keep otherwise, nothing predicts."""
    sizes = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4}
    config = {
        "rounds": 1,
        "task": task,
        "method": {"name": "fedavg", "adapter": adapter},
        "model": {"path": "random", "tokenizer": "bytes", "config": {**sizes, **model}},
        "data": {
            "source": "synthetic",
            "examples_per_client": 160,
            "max_length": 128,
            "cache_dir": str(tmp_path / "cache"),
        },
        "partition": {"kind": "by_file"},
        "clients": {"count": 2},
        "train": {"batch_size": 32},
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
    assert measured > 100e6
    assert abs(predicted / measured - 1) < 0.25
