"""How much of a GPU a tier needs, and how many actors a planned cluster holds: packing by hand."""

from typing import Any

import pytest
from paper_models import LLAMA_3_8B
from transformers import LlamaConfig

from fedray.config import Memory, load_config
from fedray.errors import ConfigError
from fedray.experiment.outline import footprints
from fedray.methods.registry import build_method
from fedray.models.backbone import meta_backbone
from fedray.planning.accounting import Cost
from fedray.planning.cluster_plan import (
    PROCESS,
    Cluster,
    Plan,
    check_device,
    parse_bytes,
    parse_node,
    plans,
    rooms,
    this_machine,
)
from fedray.planning.memory import Footprint
from fedray.training.base_model import held_once
from fedray.training.metering import CUDA_CONTEXT

COST = Cost(1, 2, 1, 1, 4, 4, "-")
GB = 10**9


def configured(**clients: Any) -> Any:
    return load_config(
        {
            "rounds": 1,
            "method": "fedavg",
            "model": {"path": "random", "tokenizer": "bytes", "config": {"model_type": "bert"}},
            "data": {"source": "synthetic"},
            "clients": clients,
        }
    )


def of_model(model: dict[str, Any], adapter: str = "lora", share_base: bool = True, **tier: Any) -> Any:
    """512 tokens and one example at a time, with a base model in bfloat16."""
    return load_config(
        {
            "rounds": 1,
            "task": "causal_lm",
            "method": {"name": "fedavg", "adapter": adapter},
            "model": {"path": "random", "tokenizer": "bytes", "config": model, "dtype": "bfloat16"},
            "data": {"source": "synthetic", "max_length": 512},
            "clients": {"count": 8, "share_base": share_base, "tiers": {"all": {"share": 1.0, **tier}}},
            "train": {"batch_size": 1},
            "evaluation": {"batch_size": 1},
        }
    )


def footprint(
    weights: int = 0, gradients: int = 0, offloaded: int = 0, shared: int = 0, held_once: int = 0
) -> Footprint:
    return Footprint(Memory(weights, gradients=gradients), Memory(optimizer=offloaded), 0, shared, held_once)


def plan(tier: str = "default", gpu: float = 0.0, host: int = 0, shared: int = 0) -> Plan:
    return Plan("fedavg", tier, COST, footprint(shared=shared), gpu > 0, gpu, host)


def planned(config: Any, cluster: Cluster, **by_tier: Footprint) -> dict[str, Plan]:
    found = {"fedavg": {tier: (COST, held) for tier, held in by_tier.items()}}
    return {made.tier: made for made in plans(config, found, cluster)}


def test_a_gpu_holds_the_device_and_cudas_own() -> None:
    """5.4 GB and CUDA's 0.6 are a quarter of 24; the host has what is offloaded, and the process."""
    held = footprint(weights=5 * GB, gradients=400_000_000, offloaded=GB, shared=5 * GB)
    (made,) = planned(configured(), Cluster(({"CPU": 4, "GPU": 1},), 24 * GB), default=held).values()
    assert 5_400_000_000 + CUDA_CONTEXT == 6 * GB
    assert (made.on_gpu, made.gpu, made.host) == (True, 0.25, PROCESS + GB)


def test_a_gpu_holds_a_common_base_model_once() -> None:
    """Of 80 GB, 19.4 and a context are the base model's, which leaves 60 GB: 20 actors of 2.4 GB and a context. Each
    with a base model of its own, three. A whole GPU shares nothing."""
    held = footprint(weights=19_400_000_000, gradients=2_400_000_000, held_once=19_400_000_000)
    gpu = Cluster(({"CPU": 64, "GPU": 1},), 80 * GB)
    (made,) = planned(configured(), gpu, default=held).values()
    assert (made.gpu, made.held_once) == (0.05, 19_400_000_000)
    assert rooms(configured().clients, [made], gpu.nodes)[0].alone == 20
    (whole,) = planned(configured(num_gpus=1), gpu, default=held).values()
    assert (whole.gpu, whole.held_once) == (pytest.approx(0.28, abs=1e-4), 0)
    alone = footprint(weights=19_400_000_000, gradients=2_400_000_000)
    (own,) = planned(configured(), gpu, default=alone).values()
    assert (own.gpu, rooms(configured().clients, [own], gpu.nodes)[0].alone) == (whole.gpu, 3)


def test_every_precision_has_a_holder_of_its_own() -> None:
    """16 and 4 GB with two contexts leave 58.8 of 80 GB, of which an actor needs 5.88."""
    tiers = {"a": {"share": 0.5}, "b": {"share": 0.3, "precision": "nf4"}, "c": {"share": 0.2}}
    large, small = (footprint(weights=size, gradients=5_280_000_000, held_once=size) for size in (16 * GB, 4 * GB))
    made = planned(configured(tiers=tiers), Cluster(({"CPU": 4, "GPU": 1},), 80 * GB), a=large, b=small, c=large)
    assert [plan.gpu for plan in made.values()] == [0.1, 0.1, 0.1]


def test_a_tier_on_cpus_holds_nothing_on_a_gpu() -> None:
    """10 GB held once with a context leave 69.4 of 80 GB, of which 3.47 GB are a twentieth."""
    tiers = {"a": {"share": 0.5}, "b": {"share": 0.5, "num_gpus": 0, "precision": "bfloat16"}}
    held = footprint(weights=10 * GB, gradients=2_870_000_000, held_once=10 * GB)
    made = planned(configured(tiers=tiers), Cluster(({"CPU": 4, "GPU": 1},), 80 * GB), a=held, b=held)
    assert {tier: (plan.gpu, plan.held_once) for tier, plan in made.items()} == {"a": (0.05, 10 * GB), "b": (0.0, 0)}


def test_what_is_not_held_once() -> None:
    """Small base models, which a context outweighs; those whose parameters train; those that are on the host; and where
    the configuration says so."""

    model = {**LLAMA_3_8B, "num_hidden_layers": 1, "vocab_size": 1000}

    def held(frozen: int, adapter: str = "lora", share_base: bool = True, **tier: Any) -> int:
        config = of_model(model, adapter, share_base, **tier)
        shapes = meta_backbone(LlamaConfig(**model), config.task)
        return held_once(
            config, config.clients.tier("all"), frozen, build_method(config, config.method[0]).attach(shapes)
        )

    assert held(CUDA_CONTEXT) == CUDA_CONTEXT
    assert held(CUDA_CONTEXT - 1) == held(GB, "full") == held(GB, share_base=False) == 0
    assert held(GB, engine="deepspeed", offload={"params": "cpu"}) == 0
    assert held(GB, engine="deepspeed", offload={"optimizer": "cpu"}) == GB
    assert held(GB, workers=2) == 0


def test_eight_actors_with_8_billion_parameters_fit_on_80_gigabytes() -> None:
    """The shapes of Llama-3.1-8B in bfloat16, 512 tokens, batch 1, LoRA of rank 8; without sharing, three."""

    def actors(share_base: bool) -> int:
        config, gpu = of_model(LLAMA_3_8B, share_base=share_base), Cluster(({"CPU": 64, "GPU": 1},), 80 * GB)
        made = plans(config, footprints(config, read_data=False), gpu)
        return rooms(config.clients, made, gpu.nodes)[0].alone

    assert actors(True) >= 8
    assert actors(False) == 3


def test_a_cpu_holds_everything_and_shares_the_base_model() -> None:
    held = footprint(weights=5 * GB, gradients=GB, offloaded=GB, shared=5 * GB)
    (made,) = planned(configured(), Cluster(({"CPU": 4},), 0), default=held).values()
    assert (made.on_gpu, made.gpu, made.host) == (False, 0.0, PROCESS + 2 * GB)


def test_who_trains_on_a_gpu() -> None:
    """As the workers decide it: `device`, and else whoever is not told to do without."""
    tiers = {"small": {"share": 0.5, "num_gpus": 0}, "large": {"share": 0.5}}
    held = {"small": footprint(GB), "large": footprint(GB)}
    cluster = Cluster(({"CPU": 4, "GPU": 1},), 24 * GB)
    made = planned(configured(tiers=tiers), cluster, **held)
    assert {tier: plan.on_gpu for tier, plan in made.items()} == {"small": False, "large": True}
    on_cpu = configured(tiers=tiers).model_copy(update={"device": "cpu"})
    assert not any(plan.on_gpu for plan in planned(on_cpu, cluster, **held).values())
    with pytest.raises(
        ConfigError, match="'large' trains on a GPU, whose memory is not known; specify it: --gpu-memory"
    ):
        planned(configured(tiers=tiers), Cluster(({"CPU": 4, "GPU": 1},), 0), **held)


@pytest.mark.parametrize(
    ("gpu", "host", "node", "actors"),
    [
        (0.25, 0, {"CPU": 16, "GPU": 2}, 8),  # four on each GPU
        (0.4, 0, {"CPU": 16, "GPU": 2}, 4),  # two on each: a part lies on one GPU
        (0.25, 0, {"CPU": 3, "GPU": 2}, 3),  # CPUs
        (0.25, 10 * GB, {"CPU": 16, "GPU": 2, "memory": 50 * GB}, 5),  # host memory
        (0.0, 10 * GB, {"CPU": 16, "memory": 64 * GB}, 6),
        (0.0, 10 * GB, {"CPU": 16}, 16),  # no memory is said: enough
        (1.0, 0, {"CPU": 16, "GPU": 2}, 2),
        (1.1, 0, {"CPU": 16, "GPU": 2}, 0),  # one process, one GPU
        (0.5, 0, {"CPU": 16}, 0),
    ],
)
def test_how_many_fit(gpu: float, host: int, node: dict[str, float], actors: int) -> None:
    (room,) = rooms(configured().clients, [plan(gpu=gpu, host=host)], [node])
    assert (room.alone, room.together) == (actors, actors)


def test_the_base_model_is_taken_off_once_per_node() -> None:
    """20 of 64 GB are shared: four actors of 10 GB each, on either node."""
    made = [plan(host=10 * GB, shared=20 * GB)]
    (room,) = rooms(configured().clients, made, 2 * [{"CPU": 16, "memory": 64 * GB}])
    assert room.alone == 8


def test_the_largest_method_counts_and_what_the_tier_asks_for() -> None:
    clients = configured(num_gpus=0.3, num_cpus=2, tiers={"a": {"share": 1, "memory": "3GB"}}).clients
    (room,) = rooms(clients, [plan("a", 0.2, GB), plan("a", 0.1, 2 * GB)], [{"CPU": 16, "GPU": 1}])
    assert room.request == {"CPU": 2, "GPU": 0.3, "memory": 3 * GB}
    assert room.alone == 3
    (room,) = rooms(clients, [plan("a", 0.2, 4 * GB), plan("a", 0.5, GB)], [{"CPU": 16, "GPU": 1}])
    assert room.request == {"CPU": 2, "GPU": 0.5, "memory": 4 * GB}


def test_tiers_share_the_cluster_by_their_clients() -> None:
    """Sixteen CPUs: three quarters of the clients, three quarters of the actors; listed ones by their number."""
    clients = configured(tiers={"a": {"share": 0.75}, "b": {"share": 0.25}}).clients
    found = {room.tier: room for room in rooms(clients, [plan("a"), plan("b")], [{"CPU": 16}])}
    assert {tier: (room.alone, room.together) for tier, room in found.items()} == {"a": (16, 12), "b": (16, 4)}
    listed = configured(tiers={"a": {"clients": ["x", "y", "z"]}, "b": {"clients": ["w"]}}).clients
    assert [room.together for room in rooms(listed, [plan("a"), plan("b")], [{"CPU": 16}])] == [12, 4]


def test_tiers_that_do_not_fit_together() -> None:
    clients = configured(tiers={"a": {"share": 0.5}, "b": {"share": 0.5}}).clients
    found = rooms(clients, [plan("a", 0.75), plan("b", 0.5)], [{"CPU": 16, "GPU": 1}])
    assert [(room.alone, room.together) for room in found] == [(1, 0), (2, 0)]


def test_nodes_are_read() -> None:
    expected = {"CPU": 16, "GPU": 4, "memory": 64 * GB, "tpu": 0.5}
    assert parse_node("CPU=16, GPU=4,memory=64GB,tpu=0.5") == expected
    assert [parse_bytes(text) for text in ("24GB", "24GiB", "1000")] == [24 * GB, 24 * 2**30, 1000]


@pytest.mark.parametrize("text", ["", "16", "CPU", "CPU=x", "CPU=-1", "CPU=nan", "CPU=inf", "memory=x,CPU=1", "=3"])
def test_a_node_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ConfigError, match="expected for example CPU=16,GPU=4,memory=64GB; cannot read"):
        parse_node(text)


def test_a_node_needs_cpus() -> None:
    with pytest.raises(ConfigError, match="client actors need CPUs"):
        parse_node("GPU=4")


@pytest.mark.parametrize("text", ["", "x", "-1", "0", "24 apples"])
def test_no_amount_of_memory(text: str) -> None:
    with pytest.raises(ConfigError, match="is not an amount of memory; expected for example 24GB"):
        parse_bytes(text)


def test_this_machine_has_something() -> None:
    (node,) = this_machine().nodes
    assert node["CPU"] >= 1
    assert node["memory"] > GB / 4


def test_a_silo_is_several_of_what_it_asks_for() -> None:
    """Workers of half a GPU and one CPU: two GPUs hold four of them, so one silo of three, and no silo of five."""
    for workers, silos in ((2, 2), (3, 1), (5, 0)):
        clients = configured(tiers={"silo": {"share": 1.0, "workers": workers}}).clients
        (room,) = rooms(clients, [plan("silo", gpu=0.5)], [{"CPU": 16, "GPU": 2}])
        whole = float(workers == 2)  # who says nothing of GPUs gets whole ones, where there are enough
        assert room.request["GPU"] == max(whole, 0.5)
        assert (room.alone, room.together) == ((1, 1) if whole else (silos, silos))


@pytest.mark.parametrize(
    ("device", "nodes", "elastic", "missing"),
    [
        ("cuda", [{"CPU": 2.0}, {"CPU": 2.0, "GPU": 0.0}], False, True),
        ("cuda", [{"CPU": 2.0}, {"CPU": 2.0, "GPU": 1.0}], False, False),
        ("cuda", [{"CPU": 2.0}], True, False),  # an autoscaler may add the GPU
        ("auto", [{"CPU": 2.0}], False, False),
        ("cpu", [{"CPU": 2.0}], False, False),
    ],
)
def test_cuda_needs_a_gpu_somewhere(device: str, nodes: list[dict[str, float]], elastic: bool, missing: bool) -> None:
    config = load_config(configured(), {"device": device})
    if missing:
        with pytest.raises(ConfigError, match="device: cuda, but no node of the cluster has a GPU"):
            check_device(config, nodes, elastic)
    else:
        check_device(config, nodes, elastic)
