"""FedLEASE: clients alone, then clusters with an expert and a router each, by hand and in real rounds."""

from dataclasses import replace

import numpy as np
import pytest
from agreement import agree, together
from lora_clients import INITIAL, LAYOUT, cohort, factors
from planted import PLANTED
from received import received
from sklearn.metrics import adjusted_rand_score
from tiny import tiny_experiment

import fedray
from fedray.adapters.layout import Layout, Slot
from fedray.config import LoraSection
from fedray.errors import ConfigError
from fedray.methods.fedlease import Expert, FedLease
from fedray.methods.protocol import Initial, Update

LORA = LoraSection(rank=3)
MIXER = Layout(
    tuple(
        slot
        for i, width in enumerate((7, 8))
        for slot in (Slot(f"layer.{i}", "G", (7, width)), Slot(f"layer.{i}", "present", (3, 1)))
    )
)
START = Initial(
    7,
    {**INITIAL.layouts, "mixer": MIXER},
    {**INITIAL.vectors, "mixer": np.arange(MIXER.size, dtype=np.float32)},
)
GROUPS = [0, 0, 1, 1]
IDS = ("client_000", "client_001", "client_002")


def method(**options):
    return FedLease(LORA, **{"warmup_rounds": 1, **options})


def planted(seed, examples=(1, 2, 3, 4), groups=GROUPS):
    """Updates of clients around one random LoRA per group; client i's router is i + 1 everywhere."""
    rng, centres = np.random.default_rng(0), {}
    noise = np.random.default_rng(seed)
    found = []
    for index, update in enumerate(cohort(0, list(examples))):
        centre = centres.setdefault(groups[index], rng.normal(size=LAYOUT.size))
        lora = (centre + 0.02 * noise.normal(size=LAYOUT.size)).astype(np.float32)
        own = np.full(7 * (7 + 8), index + 1.0, np.float32)
        found.append(Update(update.client, update.num_examples, Expert(lora, own, None)))
    return found


def clustered(**options):
    found, updates = method(**options), planted(1)
    server, _ = found.aggregate_train(found.init_server(START, []), updates)
    return found, updates, server


def loras(updates):
    return [update.payload.lora.astype(np.float64) for update in updates]


def test_in_warm_up_nothing_is_shared_but_the_head():
    found, updates = method(warmup_rounds=2), planted(1)
    server, metrics = found.aggregate_train(found.init_server(START, []), updates)
    down = received(found, server, [update.client for update in updates])
    assert all((d.own, d.others, d.router) == (None, (), None) for d in down.values())
    assert metrics == {"experts": 0}


def test_experts_are_the_unweighted_means_of_clusters():
    """Two planted groups; every client receives its own expert, the other one, and the router's draw."""
    found, updates, server = clustered()
    assert server.pool.labels == {f"client_{i}": group for i, group in enumerate(GROUPS)}
    down = received(found, server, [update.client for update in updates])
    means = [np.mean(loras(updates)[:2], axis=0), np.mean(loras(updates)[2:], axis=0)]
    for index, group in enumerate(GROUPS):
        got = down[f"client_{index}"]
        np.testing.assert_allclose(got.own, means[group], atol=1e-6)
        (other,) = got.others
        np.testing.assert_allclose(other, means[1 - group], atol=1e-6)
        assert np.array_equal(got.router, START.vector("mixer.G"))


def test_a_round_moves_experts_and_routers_to_their_clusters_means():
    """Clients 0, 1 and 2 took part: cluster 1 has client 2 alone. Without participants a cluster stays."""
    found, _, server = clustered()
    sent = planted(2)[:3]
    after, _ = found.aggregate_train(server, sent)
    np.testing.assert_allclose(after.pool.experts[0], np.mean(loras(sent)[:2], axis=0), atol=1e-6)
    np.testing.assert_allclose(after.pool.experts[1], loras(sent)[2], atol=1e-6)
    assert (after.pool.routers[0] == 1.5).all()
    assert (after.pool.routers[1] == 3).all()
    again, _ = found.aggregate_train(after, planted(3)[:1])
    assert np.array_equal(again.pool.experts[1], after.pool.experts[1])
    assert np.array_equal(again.pool.routers[1], after.pool.routers[1])
    assert found.aggregate_train(again, [])[0] is again


def test_a_newcomer_trains_alone_and_joins_the_nearest_expert():
    found = method()
    everybody = planted(1)
    server, _ = found.aggregate_train(found.init_server(START, []), [everybody[0], everybody[2]])
    assert server.pool.labels == {"client_0": 0, "client_2": 1} or len(server.pool.experts) == 1
    found, updates, server = clustered()
    newcomer = Update(replace(updates[0].client, id="new"), 9, updates[3].payload)
    assert received(found, server, [newcomer.client])["new"].own is None
    experts = [expert.copy() for expert in server.pool.experts]
    after, _ = found.aggregate_train(server, [newcomer])
    assert after.pool.labels["new"] == 1
    assert after.pool.alone == {}
    assert all(np.array_equal(a, b) for a, b in zip(after.pool.experts, experts, strict=True))


def test_equal_clients_and_a_single_one_are_one_expert():
    for groups in ([0], [0, 0, 0]):
        found, updates = method(), planted(1, [1] * len(groups), groups)
        updates = [replace(u, payload=updates[0].payload) for u in updates]
        server, metrics = found.aggregate_train(found.init_server(START, []), updates)
        assert metrics == {"experts": 1}
        down = received(found, server, [updates[0].client])["client_0"]
        np.testing.assert_allclose(down.own, updates[0].payload.lora, atol=1e-7)
        assert down.others == ()


def test_warm_up_is_local_training(start):
    """Two rounds: every client's LoRA is `local`'s, with the head private in both."""
    alone, local = start({"name": "fedlease", "head": "local"}), start("local")
    alone.rounds(2)
    local.rounds(2)
    for id in IDS:
        np.testing.assert_allclose(alone.state(id).lora, local.state(id).adapter, atol=1e-6)
        np.testing.assert_allclose(alone.state(id).head, local.state(id).head, atol=1e-6)


def test_real_rounds_of_clusters(start):
    """The adapter computes with the experts and the router that came down; the other experts stay as they were."""
    run = start({"name": "fedlease", "warmup_rounds": 1, "max_experts": 3}, lora__rank=1)
    run.rounds(2)
    pool = run.server.pool
    assert 1 < len(pool.experts) <= 3
    for id, result in run.serve().items():
        label = pool.labels[id]
        others = [expert for index, expert in enumerate(pool.experts) if index != label]
        for place, expert in enumerate(others):
            for name, value in run.views("lora", expert).items():
                held = result.adapter[f"rest.{name}"]
                own = held[place : place + 1] if name.endswith(".A") else held[:, place : place + 1]
                assert np.array_equal(own, value)
        for name, value in result.adapter.items():
            if name.startswith("mixer.") and name.endswith(".present"):
                assert value[:, 0].tolist() == [place < len(others) for place in range(2)]
        assert np.abs(result.payload.router - pool.routers[label]).max() > 1e-4
        assert np.abs(result.payload.lora - pool.experts[label]).max() > 1e-4
    tasks = run.tasks(IDS, measure=True)
    agree(together(run.worker, tasks), [run.worker.train(task) for task in tasks])
    planned = run.prepared.costs["fedlease"]["default"]
    sizes = {name: layout.size for name, layout in run.initial.layouts.items()}
    assert planned.trainable == sizes["lora"] + run.initial.layout("mixer.G").size + sizes["head"]


def test_planted_groups_are_found(start):
    """Two groups of four clients whose labels contradict each other, under a common head."""
    run = start({"name": "fedlease", "warmup_rounds": 3}, **PLANTED)
    run.rounds(3)
    labels, groups = run.server.pool.labels, run.prepared.data.latent_group
    assert adjusted_rand_score([groups[id] for id in labels], list(labels.values())) >= 0.95


def test_tiers_of_unequal_rank(start):
    tiers = {"weak": {"clients": [IDS[0], IDS[2]], "lora_rank": 1}, "strong": {"clients": [IDS[1]]}}
    run = start({"name": "fedlease", "warmup_rounds": 1}, clients__tiers=tiers)
    run.rounds(3)
    results = run.serve()
    whole = run.initial.layouts["lora"].size
    assert [results[id].payload.lora.size for id in IDS] == [whole // 2, whole, whole // 2]


def test_components_that_nobody_in_a_cluster_holds_can_be_trained():
    """Two clients of rank 1 make an expert. Its other components are the LoRA's first values: A drawn, B = 0; with
    A = B = 0 they would have no gradient when a client of full rank joins."""
    found, updates = method(), cohort(3, [1, 2], [1, 1])
    sent = [Update(u.client, u.num_examples, Expert(u.payload.adapter, START.vector("mixer.G"), None)) for u in updates]
    server, _ = found.aggregate_train(found.init_server(START, []), sent)
    first = factors(LAYOUT, START.vectors["lora"])
    for expert in server.pool.experts:
        for (a, b), (drawn, _) in zip(factors(LAYOUT, expert), first, strict=True):
            assert np.array_equal(a[1:], drawn[1:])
            assert not b[:, 1:].any()
            assert np.abs(a[0] - drawn[0]).max() > 1e-3


def test_a_resumed_run_has_equal_bits(tmp_path):
    """Stopped after the round that finds the clusters."""
    method = {"name": "fedlease", "warmup_rounds": 1}
    config = tiny_experiment() | {"method": method, "runtime": "inline", "device": "cpu", "rounds": 3}
    whole = fedray.run(config, output=tmp_path / "whole").summaries[0].state_sha256
    fedray.run(config | {"rounds": 1}, output=tmp_path / "run")
    assert fedray.run(config, resume=tmp_path / "run").summaries[0].state_sha256 == whole


@pytest.mark.parametrize(("name", "value"), [("warmup_rounds", 0), ("max_experts", 1)])
def test_bad_numbers_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"fedlease.{name}: expected at least"):
        FedLease(LORA, **{name: value})
