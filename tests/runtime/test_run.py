"""Whole experiments on real local Ray."""

import gc
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
import ray
import torch
from eventually import eventually
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray.experimental.internal_kv import _internal_kv_get
from round_result import result_of
from safetensors.numpy import load_file
from transformers import PreTrainedModel

import fedray
from fedray import api
from fedray.config import ClientsConfig, load_config
from fedray.errors import ConfigError
from fedray.experiment.prepare import Prepared, prepare
from fedray.federation.events import MethodFinished, TasksFinished
from fedray.runtime.client_actor import ClientActor
from fedray.runtime.cluster import has_autoscaler
from fedray.runtime.driver import events
from fedray.runtime.pool import ClientPool


@pytest.mark.parametrize(
    "clients",
    [
        pytest.param({"actors": 1}, id="two actors"),  # one of each tier
        pytest.param({"actors": 2, "num_cpus": 0.5}, id="four actors", marks=pytest.mark.slow),
    ],
)
def test_every_method_gives_the_same_states_on_ray_and_inline(
    tiny: dict[str, Any], cluster: None, tmp_path: Path, clients: dict[str, Any]
) -> None:
    inline = fedray.run(tiny, runtime="inline", output=tmp_path / "inline")
    on_ray = fedray.run(tiny, output=tmp_path / "ray", clients=clients)

    def states(result: fedray.RunResult) -> dict[str, str]:
        return {summary.method: summary.state_sha256 for summary in result.summaries}

    assert states(inline) == states(on_ray)
    assert len(set(states(inline).values())) == len(tiny["method"]), "methods must differ"
    columns = ["method", "phase", "server_round", "client", "train_loss", "aggregated_metric", "personalised_metric"]
    tables = [result.clients()[columns].sort_values(columns[:4]).reset_index(drop=True) for result in (inline, on_ray)]
    pd.testing.assert_frame_equal(*tables)


def test_clients_in_one_step_give_the_same_states_on_ray_and_inline_and_nearly_those_of_one_by_one(
    tiny: dict[str, Any], cluster: None, tmp_path: Path
) -> None:
    """Who is trained with whom follows from the cohort, not from who has time."""
    config = {**tiny, "method": ["fedreft", "fedalt"], "train": {"lr": 1e-3}, "clients": {"count": 5, "fuse": 2}}
    inline = fedray.run(config, runtime="inline", output=tmp_path / "inline")
    on_ray = fedray.run(config, output=tmp_path / "ray")
    alone = fedray.run(config, runtime="inline", output=tmp_path / "alone", **{"clients.fuse": "off"})
    for fused, same, one_by_one in zip(inline.summaries, on_ray.summaries, alone.summaries, strict=True):
        assert fused.state_sha256 == same.state_sha256
        assert fused.state_sha256 != one_by_one.state_sha256, "nothing was trained in one step"
    for method in ("fedreft", "fedalt"):
        for file in (alone.path / "adapters" / method / "clients").iterdir():
            mine, theirs = load_file(file), load_file(inline.path / "adapters" / method / "clients" / file.name)
            for name, value in mine.items():
                assert np.linalg.norm(theirs[name] - value) <= 1e-4 * max(np.linalg.norm(value), 1e-3), name


@pytest.mark.slow
@pytest.mark.timeout(1800)  # the first use on a machine builds DeepSpeed's extensions
def test_tiers_with_three_engines_give_the_same_states_on_ray_and_inline(
    tiny: dict[str, Any], cluster: None, tmp_path: Path
) -> None:
    """Plain torch, ZeRO-2 with the optimizer on the CPU, ZeRO-3 with all parameters there; one actor each, or all three
    in this process, which also serves other tests' engines."""
    tiers = {
        "strong": {"share": 0.34},
        "middling": {
            "share": 0.33,
            "engine": "deepspeed",
            "offload": {"optimizer": "cpu"},
            "lora_rank": 4,
            "mask_ratio": 0.5,
        },
        "weak": {
            "share": 0.33,
            "engine": "deepspeed",
            "offload": {"params": "cpu"},
            "activation_checkpointing": True,
            "lora_rank": 2,
            "mask_ratio": 0.25,
            "reft_layers": [1],
            "batch_size": 4,
            "accumulation": 2,
        },
    }
    hft = {"name": "fedhft", "timing": "pre", "warmup_rounds": 0}
    clients = {"count": 6, "threads": 1, "tiers": tiers}
    config = {**tiny, "method": ["fedavg", "fedreft", "fedalt", hft], "clients": clients}
    inline = fedray.run(config, runtime="inline", output=tmp_path / "inline")
    on_ray = fedray.run(config, output=tmp_path / "ray")
    for mine, theirs in zip(inline.summaries, on_ray.summaries, strict=True):
        assert mine.state_sha256 == theirs.state_sha256, mine.method
    trained = on_ray.clients().query("phase == 'train'")
    assert trained.groupby(["method", "tier"]).client.nunique().eq(2).all()
    assert trained.train_loss.notna().all()


@pytest.mark.slow
def test_an_actor_killed_from_outside_costs_no_update_and_no_bit(
    tiny: dict[str, Any], cluster: None, tmp_path: Path
) -> None:
    """Of fedavg actors return means; of fedalt, which needs every update, see the lost node in test_machines."""
    method = "fedavg"
    config = load_config({**tiny, "method": method, "rounds": 3, "name": "killed"})
    undisturbed = fedray.run(config, runtime="inline", output=tmp_path / "undisturbed")
    killed = False
    for event in events(prepare(config), tmp_path / "killed"):
        if isinstance(event, TasksFinished) and event.server_round == 1 and not killed:
            killed = True
            family = psutil.Process().children(recursive=True)  # Ray's node is a child of this process
            next(p for p in family if "ray::ClientActor" in "".join(p.cmdline())).kill()
        if isinstance(event, MethodFinished):
            assert event.summary.state_sha256 == undisturbed[method].state_sha256
    assert killed
    clients = pd.read_parquet(tmp_path / "killed" / "clients.parquet")
    assert (clients[clients.phase == "train"].groupby("server_round").client.nunique() == 3).all()


@pytest.mark.parametrize(
    ("tiers", "message"),
    [
        (
            {"big": {"share": 1.0, "num_gpus": 3}},
            r"tier 'big' fits on no node: it asks for 1 CPU, 3 GPU; the cluster's nodes have 2 CPU, 2 GPU",
        ),
        ({"odd": {"share": 1.0, "resources": {"tpu": 1}}}, r"it asks for 1 CPU, 1 tpu; the cluster's nodes have 2 CPU"),
        (
            {"a": {"share": 0.5, "num_cpus": 1}, "b": {"share": 0.5, "num_cpus": 1.5}},
            r"no room for one actor of every tier at a time \(a: 1 CPU; b: 1\.5 CPU\): it has 2 CPU.*fractions",
        ),
    ],
)
def test_what_the_cluster_can_never_give_is_said_at_once(cluster: None, tiers: dict[str, Any], message: str) -> None:
    with pytest.raises(fedray.errors.ConfigError, match=message):
        ClientPool(ClientsConfig.model_validate({"tiers": tiers}), {}, dict.fromkeys(tiers, 1))


def test_four_actors_of_a_half_share_two_gpus(cluster: None) -> None:
    """Ray itself books the fractions: nothing of the two GPUs is left, and a fifth actor has no room."""
    config = ClientsConfig(num_gpus=0.5, num_cpus=0.1)
    pool = ClientPool(config, {}, {"default": 100})
    try:
        assert pool.actors("default") == 4
        assert ray.available_resources().get("GPU", 0.0) == 0.0
        ids = ray.get([handle.actor.__ray_call__.remote(_gpu_ids) for handle in pool.group.handles["default"]])
        assert sorted(gpu for (gpu,) in ids) == [0, 0, 1, 1]
        # An actor is asked: these GPUs are only in Ray's books.
        assert (pool.gpu_memory("default") is None) == (not torch.cuda.is_available())
    finally:
        pool.close()


def test_tiers_get_actors_of_their_own(cluster: None) -> None:
    """Asked for by `actors`, or one after another to the tier with the most clients."""
    tiers = {"many": {"share": 0.7, "num_cpus": 0.5}, "few": {"share": 0.3, "num_cpus": 1, "actors": 1}}
    pool = ClientPool(ClientsConfig.model_validate({"tiers": tiers}), {}, {"many": 4, "few": 2})
    try:
        assert {tier: pool.actors(tier) for tier in tiers} == {"many": 2, "few": 1}
    finally:
        pool.close()


def test_no_more_actors_are_asked_for_than_the_cluster_has_room_for(tiny: dict[str, Any], cluster: None) -> None:
    """Four actors of one CPU each are configured on two CPUs: two serve."""
    prepared = prepare(load_config({**tiny, "method": "fedavg", "clients": {"count": 4}}))
    pool = ClientPool(ClientsConfig(actors=4), prepared.data.shards, {"default": 4})
    pool.setup(prepared.worker_setups(prepared.config.method[0]))
    assert pool.actors("default") == 2
    pool.close()


def test_actors_are_not_stuck_because_their_caller_is_busy(tiny: dict[str, Any], cluster: None, tmp_path: Path) -> None:
    """With what it does while the first tasks run: writing the round before to a slow disk."""
    clients = {"count": 4, "actors": 1, "client_timeout_s": 4}
    prepared = prepare(load_config({**tiny, "method": "fedavg", "clients": clients}))
    pool = ClientPool(prepared.config.clients, prepared.data.shards, {"default": 4})
    try:
        initial = pool.setup(prepared.worker_setups(prepared.config.method[0]))
        federation = prepared.federation(prepared.config.method[0], initial, pool)
        result_of(federation.round())
        seen = []
        for event in federation.round():
            seen.append(event)
            if event is None:
                time.sleep(6)
    finally:
        pool.close()
    assert seen[0] is None
    assert {type(event) for event in seen[1:]} == {TasksFinished}


def test_client_actors_are_not_restarted_by_ray() -> None:
    assert ClientActor._default_options["max_restarts"] == 0  # type: ignore[attr-defined]


def test_the_driver_starts_while_the_data_are_read_and_ends_with_a_mistake_in_them(
    smallest: dict[str, Any], cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistaken(config: fedray.Config) -> None:
        eventually(_drivers)
        raise ConfigError("data: wrong")

    monkeypatch.setattr(api, "prepare", mistaken)
    with pytest.raises(ConfigError, match="data: wrong"):
        fedray.run(smallest, runtime="ray", output=tmp_path / "run")
    eventually(lambda: not _drivers())


def test_a_driver_that_dies_while_the_data_are_read_is_replaced(
    smallest: dict[str, Any], cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no checkpoint could be continued from: nothing has begun."""

    def deadly(config: fedray.Config) -> Prepared:
        eventually(_drivers)
        _drivers()[0].kill()
        return prepare(config)

    monkeypatch.setattr(api, "prepare", deadly)
    result = fedray.run(smallest, runtime="ray", checkpoint={"every": 0}, output=tmp_path / "run")
    assert result.events().empty


SHUTS_DOWN = """
import json, sys, fedray, ray

class ShutsDown(fedray.Callback):
    def on_run_finished(self, event):
        ray.shutdown()

ray.init(num_cpus=2, include_dashboard=False)
result = fedray.run(json.loads(sys.argv[1]), runtime="ray", output=sys.argv[2], callbacks=[ShutsDown()])
assert len(result.summaries) == 1
assert not ray.is_initialized()
"""


def test_a_callback_may_end_the_connection_when_the_run_has_finished(
    smallest: dict[str, Any], own_cluster: None, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", SHUTS_DOWN, json.dumps(smallest), str(tmp_path / "run")]
    subprocess.run(command, check=True, timeout=180, env={**os.environ, "RAY_ADDRESS": "local"})


def _drivers() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            if "ray::DriverActor" in " ".join(process.cmdline()):
                found.append(process)
    return found


def test_collections_of_an_actor_leave_out_what_it_has_imported_but_not_its_model(
    smallest: dict[str, Any], cluster: None
) -> None:
    prepared = prepare(load_config(smallest))
    pool = ClientPool(ClientsConfig(actors=1), prepared.data.shards, {"default": 1})
    try:
        pool.setup(prepared.worker_setups(prepared.config.method[0]))
        actor = pool.group.handles["default"][0].actor
        left_out, models = ray.get(actor.__ray_call__.remote(_left_out))
    finally:
        pool.close()
    assert left_out > 100_000
    assert models > 0


def _left_out(actor: Any) -> tuple[int, int]:
    """Return how many objects collections leave out, and how many models they visit."""
    return gc.get_freeze_count(), sum(isinstance(found, PreTrainedModel) for found in gc.get_objects())


def _gpu_ids(actor: Any) -> list[int]:
    return [int(gpu) for gpu in ray.get_gpu_ids()]


def test_a_plain_cluster_has_no_autoscaler(cluster: None) -> None:
    """Even after Ray's monitor, which runs everywhere, has reported."""
    until = time.monotonic() + 60
    while not _internal_kv_get(DEBUG_AUTOSCALING_STATUS.encode()) and time.monotonic() < until:
        time.sleep(0.5)
    assert _internal_kv_get(DEBUG_AUTOSCALING_STATUS.encode())
    assert not has_autoscaler()
