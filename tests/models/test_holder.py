"""One copy of the weights for several processes, here by a CPU's shared memory: who holds it, how long, and that
it stays unchanged."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from every_method import entry
from safetensors.torch import load_file, save_file
from tiny import tiny_experiment

from fedray.config import load_config
from fedray.experiment.prepare import prepare
from fedray.federation.tasks import ClientTask, downlinks_of
from fedray.federation.worker import Worker
from fedray.methods.registry import METHODS
from fedray.models import holder
from fedray.models.backbone import HELD, held_elsewhere, load_backbone
from fedray.models.holder import CannotShare, Shared, shared_tensors

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where sockets are; holders of this test end with it."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(holder, "IDLE_S", 0.5)
    yield tmp_path
    for process in holders(tmp_path):
        process.kill()
        process.wait()


@pytest.fixture
def file(folder: Path) -> Path:
    weights = {"a": torch.arange(6.0), "b": torch.ones(3, 5, dtype=torch.bfloat16)}
    save_file(weights, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def holders(folder: Path) -> list[psutil.Process]:
    found = [one for one in psutil.process_iter(["cmdline"]) if "fedray.models.holder" in (one.info["cmdline"] or ())]
    return [one for one in found if str(folder) in " ".join(one.info["cmdline"])]


def ended(process: psutil.Process) -> bool:
    try:
        process.wait(30)
    except psutil.TimeoutExpired:
        return False
    return True


OTHER = """
import sys, torch
from pathlib import Path
from fedray.models import holder
shared = holder.shared_tensors(Path(sys.argv[1]), torch.device("cpu"))
shared.tensors["a"][0] = 42.0
print("mapped", flush=True)
sys.stdin.read()
"""


def other(file: Path) -> subprocess.Popen[str]:
    """A process that maps the tensors, changes one, and lives until its input ends."""
    environment = os.environ | {"TMPDIR": str(file.parent)}
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", OTHER, str(file)], env=environment, stdin=pipe, stdout=pipe, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "mapped\n"
    return process


def test_processes_map_one_copy_which_ends_with_the_last_of_them(file: Path) -> None:
    """The other one is killed; only then, and once this one has closed its connection, the holder ends."""
    mine = shared_tensors(file, CPU)
    assert {name: tensor.dtype for name, tensor in mine.tensors.items()} == {"a": torch.float32, "b": torch.bfloat16}
    process = other(file)
    assert mine.tensors["a"].tolist() == [42, 1, 2, 3, 4, 5], "one memory"
    assert load_file(file)["a"][0] == 0, "not the file's"
    (held,) = holders(file.parent)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1.5)
    assert held.is_running()
    mine.connection.close()
    assert ended(held)
    again = shared_tensors(file, CPU)
    assert again.tensors["a"][0] == 0, "a new holder reads the file again"
    again.connection.close()


def test_a_holder_that_was_killed_is_replaced(file: Path) -> None:
    """Its socket is left behind; what was mapped on a CPU stays."""
    mine = shared_tensors(file, CPU)
    (held,) = holders(file.parent)
    held.kill()
    held.wait()
    assert shared_tensors(file, CPU).tensors["a"].tolist() == mine.tensors["a"].tolist()


def test_why_nothing_is_shared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "damaged.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(CannotShare, match="the holder of damaged.safetensors ended with 1: .*SafetensorError"):
        shared_tensors(folder / "damaged.safetensors", CPU)
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    (folder / "fedray-4711").mkdir()
    with pytest.raises(CannotShare, match="fedray-4711 belongs to another user"):
        shared_tensors(folder / "damaged.safetensors", CPU)


def experiment(folder: Path, **changes: Any) -> Any:
    config = {**tiny_experiment(), "device": "cpu", "runtime": "inline", **changes}
    config["data"] = {**config["data"], "cache_dir": str(folder / "cache")}
    return load_config(config)


def backbone(folder: Path, share: bool) -> Any:
    config = experiment(folder)
    arch = prepare(config).architecture
    return load_backbone(config.model, arch, "classification", 3, "cpu", config.data.cache_dir, share)


def test_a_model_on_shared_weights_is_the_same_model(folder: Path) -> None:
    """The head is its own, since it trains; all else is held elsewhere."""
    shared, own = backbone(folder, True), backbone(folder, False)
    for (name, one), (_, two) in zip(shared.state_dict().items(), own.state_dict().items(), strict=True):
        assert torch.equal(one, two), name
    assert held_elsewhere(own) == 0
    heads = sum(parameter.nbytes for parameter in own.classifier.parameters())
    assert held_elsewhere(shared) == sum(tensor.nbytes for tensor in own.state_dict().values()) - heads


def test_without_a_holder_everyone_has_a_copy_and_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> Shared:
        raise CannotShare("peer access is not supported")

    monkeypatch.setattr("fedray.models.backbone.shared_tensors", refuse)
    model = backbone(folder, True)
    assert held_elsewhere(model) == 0
    assert getattr(model, HELD, None) is None
    assert "holds a base model of its own, since they cannot share one: peer access is not supported" in caplog.text


@pytest.mark.parametrize("precision", [None, "bfloat16"])
def test_no_method_writes_to_what_is_shared(
    folder: Path, monkeypatch: pytest.MonkeyPatch, precision: str | None
) -> None:
    """A round of every method's: then the holder still has the file's bytes, and results are those without sharing."""
    methods = [entry(name, label=name) for name in METHODS.names]
    tiers = {"all": {"share": 1.0, "precision": precision}}
    config = experiment(folder, method=methods, clients={"count": 2, "tiers": tiers}, train={"max_steps": 2})
    prepared = prepare(config)
    sharing = Worker()
    monkeypatch.setattr(sharing, "_shares", lambda *_: True)
    files: set[Path] = set()
    monkeypatch.setattr(
        "fedray.models.backbone.shared_tensors", lambda file, device: (files.add(file), shared_tensors(file, device))[1]
    )
    for method in config.method:
        found = []
        for worker in (sharing, Worker()):
            worker.setup(prepared.worker_setups(method)["all"])
            federation = prepared.federation(method, worker.initial(), None)  # type: ignore[arg-type]
            downlinks = downlinks_of(
                federation.method.configure_train(federation.server, prepared.clients), prepared.clients
            )
            client = prepared.clients[0]
            shard = prepared.data.shards[client.id]
            found.append(worker.train(ClientTask(client, 0, downlinks[client.id], True, shard=shard)))
        assert held_elsewhere(sharing.adapter.model) > 0
        assert sharing.memory().held_elsewhere > 0
        assert found[0].report.train_loss == found[1].report.train_loss
        assert found[0].report.evaluations == found[1].report.evaluations
    (file,) = files
    held = shared_tensors(file, CPU).tensors
    for name, tensor in load_file(file).items():
        assert np.array_equal(tensor.view(torch.uint8).numpy(), held[name].view(torch.uint8).numpy()), name
