"""Clients that are several workers each, on real Ray Train."""

from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

import fedray
from fedray.config import ClientsConfig, load_config
from fedray.errors import ConfigError
from fedray.experiment.prepare import prepare
from fedray.federation.events import MethodFinished, TasksFinished
from fedray.runtime.driver import events
from fedray.runtime.pool import ClientPool

TIERS: dict[str, Any] = {
    "phone": {"share": 0.5, "num_cpus": 0.5, "num_gpus": 0, "lora_rank": 4, "reft_layers": [1]},
    "silo": {"share": 0.5, "num_cpus": 0.5, "num_gpus": 0, "workers": 2, "batch_size": 4, "actors": 1},
}


@pytest.fixture
def config(tiny: dict[str, Any]) -> dict[str, Any]:
    return {
        **tiny,
        "method": ["fedreft"],
        "clients": {"count": 4, "tiers": TIERS},
        "train": {"lr": 1e-3, "weight_decay": 0.1, "epochs": 2},
    }


def adapters(path: Path, method: str) -> dict[str, Any]:
    folder = path / "adapters" / method / "clients"
    return {f"{file.stem}.{name}": value for file in folder.iterdir() for name, value in load_file(file).items()}


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_a_silo_gives_what_one_worker_gives_and_survives_a_death(
    cluster: None, config: dict[str, Any], tmp_path: Path
) -> None:
    """Inline, one process takes all of a step's micro-batches. On Ray, one of the silo's workers is killed in the first
    round: the silo starts anew and its client is trained again."""
    inline = fedray.run(config, runtime="inline", output=tmp_path / "inline")
    killed, finished = False, []
    for event in events(prepare(load_config(config)), tmp_path / "ray"):
        if isinstance(event, TasksFinished) and not killed:
            family = psutil.Process().children(recursive=True)
            worker = next((p for p in family if "RayTrainWorker" in "".join(p.cmdline())), None)
            if worker is not None:
                worker.kill()
                killed = True
        if isinstance(event, MethodFinished):
            finished.append(event.summary)
    assert killed
    assert [summary.method for summary in finished] == ["fedreft"]
    for mine, theirs in zip(inline.summaries, finished, strict=True):
        assert mine.uplink_bytes == theirs.uplink_bytes
        ours, others = (adapters(tmp_path / run, mine.method) for run in ("inline", "ray"))
        assert ours.keys() == others.keys()
        for name, value in ours.items():
            assert np.linalg.norm(others[name] - value) <= 1e-5 * max(np.linalg.norm(value), 1e-3), name
    steps = fedray.RunResult.load(tmp_path / "inline").clients().groupby("tier").steps.max()
    examples = prepare(load_config(config)).clients[0].num_examples
    assert steps["silo"] == 2 * -(-examples // 8), "two workers of 4 examples take steps of 8"


def test_workers_need_room_at_the_same_time(cluster: None) -> None:
    clients = ClientsConfig.model_validate({"tiers": {"silo": {"share": 1, "workers": 3, "num_cpus": 1}}})
    with pytest.raises(ConfigError, match="silo: 3 workers of 1 CPU") as caught:
        ClientPool(clients, {}, {"silo": 1})
    assert "2 CPU" in str(caught.value)
