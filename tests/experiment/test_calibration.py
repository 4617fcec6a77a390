"""What is timed at the start of a run becomes a part of its configuration."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import fedray
from fedray.config import load_config
from fedray.errors import ConfigError
from fedray.experiment.calibration import USED_MEMORY, calibrated
from fedray.experiment.prepare import prepare
from fedray.federation.local_pool import LocalPool

BASE: dict[str, Any] = {
    "rounds": 1,
    "method": "fedavg",
    "runtime": "inline",
    "model": {
        "path": "random",
        "tokenizer": "bytes",
        "config": {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    },
    "data": {"source": "synthetic", "examples_per_client": 12, "max_length": 16},
    "partition": {"kind": "by_file"},
}


class Finds(LocalPool):
    """A pool of `size` workers who take `seconds` where `width` clients train together; notes who was asked.
    `gpu` is how many bytes of a GPU each of them may take."""

    def __init__(self, prepared: Any, width: int, size: int = 1, seconds: float = 0.1, gpu: int | None = None):
        super().__init__(prepared.data.shards)
        self.width, self.seconds = width, seconds
        self.size, self.gpu = size, gpu
        self.asked: list[list[str]] = []

    def actors(self, tier: str) -> int:
        return self.size

    def gpu_memory(self, tier: str) -> int | None:
        return self.gpu

    def width_seconds(self, tasks: Any) -> dict[int, float]:
        self.asked.append([task.client.id for task in tasks])
        assert all(task.keep == "nothing" for task in tasks)
        return {1: 1.0} | {self.width: self.seconds}


@pytest.mark.parametrize(("found", "kept"), [(4, 4), (1, "off")])
def test_auto_is_replaced_by_what_was_found(found: int, kept: int | str) -> None:
    prepared = prepare(load_config({**BASE, "clients": {"count": 5, "fuse": "auto"}}))
    pool = Finds(prepared, found)
    assert calibrated(prepared, pool).config.clients.fuse == kept
    assert [len(ids) for ids in pool.asked] == [5]


@pytest.mark.parametrize(("actors", "share"), [(1, 12), (2, 12), (3, 8), (50, 1)])
def test_as_many_are_timed_as_an_actor_gets_in_a_round(actors: int, share: int) -> None:
    """24 of 30 clients per round; where that is more than 16, an equal part of them."""
    prepared = prepare(load_config({**BASE, "clients": {"count": 30, "per_round": 24, "fuse": "auto"}}))
    pool = Finds(prepared, 4, actors)
    calibrated(prepared, pool)
    assert [len(ids) for ids in pool.asked] == [share]


@pytest.mark.parametrize(("per_round", "kept"), [(20, "off"), (16, 8)])
def test_groups_that_keep_one_actor_waiting_for_another_are_no_gain(per_round: int, kept: int | str) -> None:
    """In groups of 8 that take 0.8 of the time, 20 clients on two actors take that of 12 · 0.8 instead of 10."""
    clients = {"count": 30, "per_round": per_round, "fuse": "auto"}
    prepared = prepare(load_config({**BASE, "clients": clients}))
    assert calibrated(prepared, Finds(prepared, 8, size=2, seconds=0.8)).config.clients.fuse == kept


def test_a_tier_has_its_part_of_the_cohort() -> None:
    """20 of 40 clients per round are 10 of a tier's 20, also if all of them could be of one tier."""
    tiers = {"a": {"share": 0.5, "fuse": "auto"}, "b": {"share": 0.5}}
    prepared = prepare(load_config({**BASE, "clients": {"count": 40, "per_round": 20, "tiers": tiers}}))
    pool = Finds(prepared, 10, size=2, seconds=0.8)  # 10 in one step would keep one of two actors waiting
    assert calibrated(prepared, pool).config.clients.tiers["a"].fuse == "off"
    assert [len(ids) for ids in pool.asked] == [5]


def test_every_tier_has_its_own_and_only_auto_is_timed() -> None:
    tiers = {
        "a": {"share": 0.4, "fuse": "auto"},
        "b": {"share": 0.4, "fuse": 3},
        "c": {"share": 0.2, "fuse": "auto"},  # one client: nobody to train with
    }
    prepared = prepare(load_config({**BASE, "clients": {"count": 5, "tiers": tiers}}))
    pool = Finds(prepared, 2)
    clients = calibrated(prepared, pool).config.clients
    assert {name: tier.fuse for name, tier in clients.tiers.items()} == {"a": 2, "b": 3, "c": "off"}
    assert [len(ids) for ids in pool.asked] == [2]


def test_the_default_is_one_by_one_and_times_nothing() -> None:
    prepared = prepare(load_config({**BASE, "clients": {"count": 2}}))
    pool = Finds(prepared, 8)
    assert calibrated(prepared, pool) is prepared
    assert prepared.config.clients.tier("default").fuse_width == 1
    assert pool.asked == []


def with_fuse(prepared: Any, fuse: int) -> Any:
    clients = prepared.config.clients.model_copy(update={"fuse": fuse})
    return replace(prepared, config=prepared.config.model_copy(update={"clients": clients}))


@pytest.mark.parametrize("clients", [{}, {"fuse": "auto"}])
def test_on_a_gpu_the_width_is_what_fits_into_a_share_of_its_memory(clients: dict[str, Any]) -> None:
    """Ten clients for each of two actors, and memory of which 0.8 hold eight of them by prediction, and not ten: two
    steps of five. With memory for all, ten; without, one by one. Nothing is timed."""
    config = {**BASE, "device": "auto", "method": ["fedavg", "local"], "clients": {"count": 20, **clients}}
    prepared = prepare(load_config(config))
    wide = with_fuse(prepared, 8)
    eight, alone = (
        max(found.footprint(entry, "default").device.total for entry in prepared.config.method)
        for found in (wide, prepared)
    )
    for room, width in ((eight, 5), (4 * eight, 10), (alone, "off")):
        pool = Finds(prepared, 4, size=2, gpu=math.ceil(room / USED_MEMORY) + 1)
        assert calibrated(prepared, pool).config.clients.fuse == width
        assert pool.asked == []


def test_a_width_is_given_off_or_left_to_the_device() -> None:
    """On a GPU: a number and `off` stay, engines that train one by one get `off` only where `auto` asks."""
    offloaded = {"engine": "deepspeed", "offload": {"optimizer": "cpu"}}
    tiers = {
        "given": {"share": 0.2, "fuse": 3},
        "off": {"share": 0.2, "fuse": "off"},
        "left": {"share": 0.2},
        "offloaded": {"share": 0.2, **offloaded},
        "cpu": {"share": 0.2, "num_gpus": 0},
    }
    prepared = prepare(load_config({**BASE, "clients": {"count": 20, "tiers": tiers}}))
    pool = Finds(prepared, 4, gpu=10**12)
    found = {name: tier.fuse for name, tier in calibrated(prepared, pool).config.clients.tiers.items()}
    assert found == {"given": 3, "off": "off", "left": 4, "offloaded": None, "cpu": None}
    assert pool.asked == []
    on_cpu = prepared.config.model_copy(update={"device": "cpu"})
    assert calibrated(replace(prepared, config=on_cpu), pool).config == on_cpu


@pytest.mark.parametrize(
    ("tier", "device", "threads"),
    [
        ({}, "cpu", 1),
        ({}, "cuda", 1),
        ({"engine": "deepspeed"}, "cuda", 1),
        ({"engine": "deepspeed", "offload": {"optimizer": "cpu"}}, "cuda", 4),
        ({"engine": "deepspeed", "offload": {"params": "cpu"}, "num_cpus": 6}, "cuda", 6),
        ({"engine": "deepspeed", "offload": {"params": "cpu"}, "num_cpus": 6}, "cpu", 1),
    ],
)
def test_threads_where_the_host_moves_the_parameters(tier: dict[str, Any], device: str, threads: int) -> None:
    config = load_config({**BASE, "clients": {"count": 2, "tiers": {"a": {"share": 1, **tier}}}})
    assert config.clients.tier_threads(config.clients.tier("a"), device) == threads
    given = config.clients.model_copy(update={"threads": 2})
    assert given.tier_threads(given.tier("a"), device) == 2


def test_a_run_keeps_what_it_found_and_a_run_with_that_gives_the_same_bits(tmp_path: Path) -> None:
    config = {**BASE, "clients": {"count": 4, "fuse": "auto"}}
    first = fedray.run(config, output=tmp_path / "first")
    kept = yaml.safe_load((tmp_path / "first" / "config.yaml").read_text())["clients"]["fuse"]
    assert kept is False or kept == "off" or kept in (2, 4)
    again = fedray.run(tmp_path / "first" / "config.yaml", output=tmp_path / "again")
    assert again["fedavg"].state_sha256 == first["fedavg"].state_sha256


@pytest.mark.parametrize(
    ("clients", "message"),
    [
        ({"fuse": 1}, "clients.fuse"),
        ({"fuse": "on"}, "clients.fuse"),
        ({"tiers": {"a": {"share": 1, "fuse": 4, "workers": 2}}}, "fuse: 4 clients in one step need engine: torch"),
        ({"tiers": {"a": {"share": 1, "fuse": 4, "engine": "deepspeed"}}}, "fuse: 4 clients in one step need engine"),
    ],
)
def test_bad_widths_are_refused(clients: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config({**BASE, "clients": clients})
