"""Simulated device time, by hand, and which clients take part."""

import math
from dataclasses import replace
from typing import Any

import pytest

from fedray.config import ClientsConfig, Config, TierConfig, TrainConfig, load_config
from fedray.experiment.calibration import calibrated
from fedray.experiment.prepare import prepare
from fedray.experiment.run import run_experiment
from fedray.federation.events import MethodFinished
from fedray.federation.local_pool import LocalPool
from fedray.federation.participation import (
    Participation,
    cohort_size,
    device_seconds,
    examples_trained,
    select_participants,
)
from fedray.types import Client


def test_seconds_by_hand() -> None:
    """Down 1 MB at 8 Mbit/s is 1 s, up 1 MB at 2 Mbit/s is 4 s; 3 s of training at half the speed are 6; twice 0.25 s
    of latency: 11.5 s."""
    phone = TierConfig(share=1.0, speed=0.5, down_mbps=8, up_mbps=2, latency_s=0.25)
    assert device_seconds(phone, 3.0, 1_000_000, 1_000_000) == 11.5
    assert device_seconds(TierConfig(share=1.0), 3.0, 10**12, 10**12) == 3.0, "no bandwidth given, no time counted"


def test_examples_by_hand() -> None:
    assert examples_trained(10, TrainConfig(epochs=2.5)) == 25
    assert examples_trained(10, TrainConfig(epochs=2, max_steps=3, batch_size=2, accumulation=2)) == 12


@pytest.mark.parametrize(
    ("per_round", "over", "total", "size"),
    [(10, 0.3, 100, 13), (10, 0.25, 100, 13), (10, 0.1, 100, 11), (10, 3, 20, 20), (None, 0, 7, 7), (3, 0, 7, 3)],
)
def test_a_round_selects_more_clients_than_it_takes(per_round: int | None, over: float, total: int, size: int) -> None:
    clients = ClientsConfig(per_round=per_round, over_selection=over)
    assert cohort_size(clients, total) == size


def selected(clients: ClientsConfig, cohort: list[Client], server_round: int = 0, seed: int = 0) -> Participation:
    tiers = clients.tier_names
    train, up_bytes = dict.fromkeys(tiers, TrainConfig()), dict.fromkeys(tiers, 0)
    return select_participants(clients, seed, server_round, cohort, 10, train, {c.id: 0 for c in cohort}, up_bytes)


def ids(clients: tuple[Client, ...]) -> list[str]:
    return [client.id for client in clients]


COHORT = [Client(name, index, size) for index, (name, size) in enumerate(zip("abcd", (10, 40, 20, 30), strict=True))]
"""With 0.1 s per example they need 1, 4, 2 and 3 s."""


def test_the_first_ones_are_taken() -> None:
    found = selected(ClientsConfig(per_round=2, over_selection=1, example_seconds=0.1), COHORT)
    assert (ids(found.participants), ids(found.stragglers), found.seconds) == (["a", "c"], ["b", "d"], 2.0)
    assert found.arrivals == pytest.approx({"a": 1.0, "b": 4.0, "c": 2.0, "d": 3.0})


def test_the_deadline_is_waited_for_if_clients_are_missing_and_none_is_taken_after_it() -> None:
    found = selected(ClientsConfig(per_round=4, deadline_s=2.5, example_seconds=0.1), COHORT)
    assert (ids(found.participants), ids(found.stragglers), found.seconds) == (["a", "c"], ["b", "d"], 2.5)
    all_in_time = selected(ClientsConfig(per_round=4, deadline_s=9, example_seconds=0.1), COHORT)
    assert (ids(all_in_time.participants), all_in_time.seconds) == (["a", "b", "c", "d"], 4.0)
    nobody = selected(ClientsConfig(per_round=4, deadline_s=0.5, example_seconds=0.1), COHORT)
    assert (nobody.participants, nobody.seconds) == ((), 0.5)


def test_without_a_cost_there_are_no_stragglers() -> None:
    found = selected(ClientsConfig(), COHORT)
    assert (ids(found.participants), found.stragglers, found.arrivals, found.seconds) == (
        ["a", "b", "c", "d"],
        (),
        {},
        None,
    )


def test_clients_drop_out_as_often_as_their_tier_says() -> None:
    """1,000 rounds of a tier of 0.3: 300 ± 3·√(1000·0.3·0.7) = ± 44; the other tier's never. By seed and round."""
    clients = ClientsConfig.model_validate({"tiers": {"a": {"share": 0.5, "dropout": 0.3}, "b": {"share": 0.5}}})
    pair = [replace(COHORT[0], tier="a"), replace(COHORT[1], tier="b")]
    found = [ids(selected(clients, pair, server_round).dropped_out) for server_round in range(1000)]
    assert 256 <= sum(out == ["a"] for out in found) <= 344
    assert all(out in ([], ["a"]) for out in found)
    assert found == [ids(selected(clients, pair, server_round).dropped_out) for server_round in range(1000)]
    assert found != [ids(selected(clients, pair, server_round, seed=1).dropped_out) for server_round in range(1000)]


# ---------------------------------------------------------------- whole experiments


def experiment(tmp_path: Any, **clients: Any) -> Config:
    return load_config(
        {
            "rounds": 2,
            "method": ["fedavg", "fedreft"],
            "model": {
                "path": "random",
                "tokenizer": "bytes",
                "config": {
                    "model_type": "bert",
                    "hidden_size": 16,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "intermediate_size": 16,
                },
            },
            "data": {
                "source": "synthetic",
                "examples_per_client": 16,
                "max_length": 16,
                "cache_dir": str(tmp_path / "cache"),
            },
            "partition": {"kind": "by_file"},
            "clients": {"count": 6, **clients},
            "device": "cpu",
            "runtime": "inline",
        }
    )


def run(config: Config, path: Any) -> dict[str, Any]:
    prepared = prepare(config)
    events = run_experiment(prepared, LocalPool(prepared.data.shards), path)
    return {event.summary.method: event.summary for event in events if isinstance(event, MethodFinished)}


def test_a_slow_tier_misses_the_deadline_and_its_clients_never_train(tmp_path: Any) -> None:
    """10 examples · 0.1 s = 1 s on the fast tier, 4 s on the slow one: half of six clients are late in both rounds,
    each of which lasts until the deadline."""
    tiers = {"fast": {"share": 0.5}, "slow": {"share": 0.5, "speed": 0.25}}
    config = experiment(tmp_path, tiers=tiers, deadline_s=3.0, example_seconds=0.1)
    for summary in run(config, tmp_path / "run").values():
        assert (summary.late, summary.dropped_out) == (6, 0)
        assert summary.simulated_seconds == pytest.approx(6.0)
    import pandas as pd

    rounds, clients = (pd.read_parquet(tmp_path / "run" / f"{name}.parquet") for name in ("rounds", "clients"))
    trained = clients[clients.phase == "train"]
    assert set(trained.tier) == {"fast"}
    assert trained.simulated_seconds.to_numpy() == pytest.approx(1.0)
    assert (rounds[rounds.phase == "train"].late == 3).all()
    assert set(clients[clients.phase == "final"].tier) == {"fast", "slow"}, "all clients take part in the final pass"


def test_a_round_without_participants_changes_nothing(tmp_path: Any) -> None:
    methods = ["local", "head_only", "fedavg", "fedreft", "fedalt", {"name": "fedhft", "warmup_rounds": 0}]
    config = load_config(experiment(tmp_path, deadline_s=1.0, example_seconds=100.0), {"method": methods})
    for summary in run(config, tmp_path / "run").values():
        assert (summary.late, summary.uplink_bytes, summary.simulated_seconds) == (12, 0, 2.0)
        assert summary.personalised_mean is not None


def test_the_cost_is_measured_once_and_kept(tmp_path: Any) -> None:
    """And what is kept decides: the run's own configuration gives the same cohorts and states again."""
    config = experiment(tmp_path, per_round=3, over_selection=0.5)
    assert config.clients.example_seconds is None
    first = run(config, tmp_path / "first")
    kept = load_config(tmp_path / "first" / "config.yaml")
    assert kept.clients.example_seconds is not None
    assert 0 < kept.clients.example_seconds < math.inf
    again = run(kept, tmp_path / "again")
    assert load_config(tmp_path / "again" / "config.yaml") == kept
    for name, summary in first.items():
        assert summary.state_sha256 == again[name].state_sha256
        assert summary.simulated_seconds == again[name].simulated_seconds
        assert summary.late == 2 * (5 - 3)


def test_nothing_is_measured_where_nothing_depends_on_it(tmp_path: Any) -> None:
    for config in (experiment(tmp_path), experiment(tmp_path, deadline_s=1.0, example_seconds=0.5)):
        prepared = prepare(config)
        assert calibrated(prepared, LocalPool(prepared.data.shards)) is prepared
