"""FedTreeLoRA: FedIT with one cluster, FedALT with a number per target with one client each, and planted trees."""

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
from fedray.methods.fedtreelora import ClientState, FedTreeLora
from fedray.methods.parts.capacity import own_layout
from fedray.methods.parts.layer_clusters import LayerClusters, layers
from fedray.types import Client

LORA = LoraSection(rank=3)


def method(**options):
    return FedTreeLora(LORA, **{"warmup_rounds": 1, **options})


def begun(found, updates):
    return found.init_server(INITIAL, [update.client for update in updates])


def target(vector, index):
    """One target's values; every target of LAYOUT is a layer."""
    return vector[layers(LAYOUT)[index][1]].astype(np.float64)


def test_layers_are_the_models_blocks():
    paths = ["encoder.layer.0.q", "encoder.layer.0.v", "encoder.layer.11.q", "decoder.block.0.0.q", "proj"]
    layout = Layout(tuple(slot for p in paths for slot in (Slot(p, "A", (1, 2)), Slot(p, "B", (3, 1)))))
    assert [targets for targets, _ in layers(layout)] == [(0, 1), (2,), (3,), (4,)]
    assert [list(columns) for _, columns in layers(layout)][1] == [10, 11, 12, 13, 14]


def test_warm_up_is_fedit():
    """One vector for all clients, the mean by examples, and no second branch."""
    found, updates = method(warmup_rounds=3), cohort(0, [1, 2, 5])
    server = begun(found, updates)
    for seed in (1, 2):
        updates = cohort(seed, [1, 2, 5])
        server, metrics = found.aggregate_train(server, updates)
        expected = sum(n / 8 * u.payload.adapter.astype(np.float64) for n, u in zip([1, 2, 5], updates, strict=True))
        for down in received(found, server, [update.client for update in updates]).values():
            np.testing.assert_allclose(down.adapter, expected, atol=1e-6)
            assert down.rest is None
        assert metrics == {"first_layer_clusters": 1, "last_layer_clusters": 1}


def test_one_client_per_cluster_is_fedalt():
    """Everybody receives its own LoRA back, and the others' unweighted mean; absent clients count with their latest."""
    found = method(clusters=99)
    first, second = cohort(1, [1, 2, 5]), cohort(2, [1, 2, 5])[:2]
    server, _ = found.aggregate_train(begun(found, first), first)
    server, metrics = found.aggregate_train(server, second)
    latest = [second[0].payload.adapter, second[1].payload.adapter, first[2].payload.adapter]
    for index, down in enumerate(received(found, server, [update.client for update in first]).values()):
        np.testing.assert_allclose(down.adapter, latest[index], atol=1e-6)
        others = [vector.astype(np.float64) for place, vector in enumerate(latest) if place != index]
        np.testing.assert_allclose(down.rest, np.mean(others, axis=0), atol=1e-6)
    assert metrics == {"first_layer_clusters": 3, "last_layer_clusters": 3}


def test_one_cluster_has_no_others():
    found, updates = method(clusters=1), cohort(3, [1, 2, 5])
    server, _ = found.aggregate_train(begun(found, updates), updates)
    for down in received(found, server, [update.client for update in updates]).values():
        assert not down.rest.any()


def planted(seed, layer_groups):
    """Updates that are their groups' centres with a little noise, in each layer. layer_groups: [layer][client]."""
    rng, updates = np.random.default_rng(seed), cohort(seed, [1, 2, 3, 4])
    centres = {}
    moved = []
    for index, update in enumerate(updates):
        vector = update.payload.adapter.copy()
        for layer, groups in enumerate(layer_groups):
            columns = layers(LAYOUT)[layer][1]
            centre = centres.setdefault((layer, groups[index]), rng.normal(size=len(columns)))
            vector[columns] = centre + 0.02 * rng.normal(size=len(columns))
        moved.append(replace(update, payload=replace(update.payload, adapter=vector)))
    return moved


def test_a_planted_tree_is_found():
    """The first layer is common to all but noise, the second one has two groups: {0, 1} and {2, 3}."""
    found, updates = method(max_clusters=2), planted(5, [[0, 0, 1, 1], [0, 0, 1, 1]])
    server, _ = found.aggregate_train(begun(found, updates), updates)
    assert server.clusters.labels == {f"client_{i}": (i // 2, i // 2) for i in range(4)}
    down = list(received(found, server, [update.client for update in updates]).values())
    vectors = [update.payload.adapter.astype(np.float64) for update in updates]
    np.testing.assert_allclose(down[0].adapter, (vectors[0] + 2 * vectors[1]) / 3, atol=1e-6)
    np.testing.assert_allclose(down[1].rest, (3 * vectors[2] + 4 * vectors[3]) / 7, atol=1e-6)
    assert np.array_equal(down[2].adapter, down[3].adapter)


def test_deeper_layers_have_at_least_as_many_clusters():
    """Equal updates in the first layer: one cluster there, two in the second. The other way round: two in both."""
    for layer_groups, numbers in (([[0] * 4, [0, 0, 1, 1]], (1, 2)), ([[0, 0, 1, 1], [0] * 4], (2, 2))):
        found, updates = method(), planted(6, layer_groups)
        shared = layer_groups.index([0] * 4)
        columns = layers(LAYOUT)[shared][1]
        for update in updates:
            update.payload.adapter[columns] = updates[0].payload.adapter[columns]
        _, metrics = found.aggregate_train(begun(found, updates), updates)
        assert tuple(metrics.values()) == numbers
    for seed in range(10):
        clusters = (
            method(max_clusters=4)
            .aggregate_train(begun(method(), updates := cohort(seed, [1, 1, 1, 1, 1])), updates)[0]
            .clusters
        )
        assert len(clusters.states[0]) <= len(clusters.states[1])


def test_a_newcomer_starts_from_the_mean_of_all_and_joins_the_tree():
    found, everybody = method(max_clusters=2), planted(5, [[0, 0, 1, 1], [0, 0, 1, 1]])
    server, _ = found.aggregate_train(begun(found, everybody), everybody[:3])
    assert set(server.clusters.labels) == {"client_0", "client_1", "client_2"}
    down = received(found, server, [everybody[3].client])["client_3"]
    own = [server.clusters.own(server.clusters.labels[f"client_{i}"]).astype(np.float64) for i in range(3)]
    np.testing.assert_allclose(down.adapter, np.mean(own, axis=0), atol=1e-6)
    assert not down.rest.any()
    server, _ = found.aggregate_train(server, everybody[3:])
    assert server.clusters.labels == {f"client_{i}": (i // 2, i // 2) for i in range(4)}


def test_clusters_without_participants_and_empty_cohorts_stay():
    found, updates = method(max_clusters=2), planted(5, [[0, 0, 1, 1], [0, 0, 1, 1]])
    server, _ = found.aggregate_train(begun(found, updates), updates)
    after, _ = found.aggregate_train(server, updates[:1])
    for level in range(2):
        assert np.array_equal(after.clusters.states[level][1], server.clusters.states[level][1])
        np.testing.assert_allclose(
            after.clusters.states[level][0], target(updates[0].payload.adapter, level), atol=1e-6
        )
    assert found.aggregate_train(server, [])[0] is server


def test_tiers_average_what_they_hold():
    """Ranks 1, 2 and 3 in one cluster: component i is the mean over those who have it; a tier receives its rank."""
    found, updates = method(clusters=1), cohort(7, [1, 2, 5], [1, 2, None])
    server, _ = found.aggregate_train(begun(found, updates), updates)
    sent = [factors(own_layout(LAYOUT, u.client.capacity), u.payload.adapter) for u in updates]
    for index, (a, _) in enumerate(factors(LAYOUT, server.clusters.own(None))):
        for i in range(3):
            held = [(n, one[index][0][i]) for n, one in zip([1, 2, 5], sent, strict=True) if len(one[index][0]) > i]
            expected = sum(n * row for n, row in held) / sum(n for n, _ in held)
            np.testing.assert_allclose(a[i], expected, atol=1e-6)
    down = received(found, server, [updates[0].client])["client_0"]
    assert down.adapter.size == down.rest.size == LAYOUT.size // 3


def test_values_that_nobody_holds_stay():
    clusters = LayerClusters.of(LAYOUT, np.ones(LAYOUT.size, np.float32))
    held = np.full(LAYOUT.size, np.nan, np.float32)
    held[3] = 7
    found = clusters.moved({"a": held}, {"a": 2}).own(None)
    assert found[3] == 7
    assert (np.delete(found, 3) == 1).all()


def test_one_cluster_everywhere_trains_as_fedit(start):
    """Three real rounds of two of three clients, within 1e-6; w never moves, since the others' LoRA is zero."""
    tree = start({"name": "fedtreelora", "clusters": 1, "warmup_rounds": 1}, clients__per_round=2)
    fedit = start("fedavg", clients__per_round=2)
    for _ in range(3):
        tree.round()
        fedit.round()
        np.testing.assert_allclose(tree.server.clusters.own(None), fedit.server.shared.adapter, atol=1e-6)
        np.testing.assert_allclose(tree.server.head, fedit.server.shared.head, atol=1e-6)
    assert all(not state.weights.any() for state in tree.states().values())


def test_two_real_rounds_of_clusters(start):
    """After the tree w trains, is private, and is one number per target; plan counts 2P + h down and P + L + h."""
    run = start({"name": "fedtreelora", "clusters": 3, "warmup_rounds": 1})
    run.rounds(2)
    states = run.states()
    assert all(isinstance(state, ClientState) for state in states.values())
    assert {state.weights.size for state in states.values()} == {4}
    assert all(np.abs(state.weights).min() > 1e-4 for state in states.values())
    sizes = {name: layout.size for name, layout in run.initial.layouts.items()}
    planned = run.prepared.costs["fedtreelora"]["default"]
    assert planned.trainable == sizes["lora"] + 4 + sizes["head"]
    assert planned.uplink == sizes["lora"] + sizes["head"]
    assert planned.downlink == 2 * sizes["lora"] + sizes["head"]
    for result in run.serve().values():
        assert (result.uplink_bytes, result.downlink_bytes) == (planned.uplink_bytes, planned.downlink_bytes)


def test_planted_groups_are_found(start):
    """Two groups of four clients whose labels contradict each other, under a common head. In both layers."""
    run = start({"name": "fedtreelora", "warmup_rounds": 3}, **PLANTED)
    run.rounds(3)
    labels, groups = run.server.clusters.labels, run.prepared.data.latent_group
    for layer in range(2):
        found = [own[layer] for own in labels.values()]
        assert adjusted_rand_score([groups[id] for id in labels], found) >= 0.95


def test_clients_in_one_step_are_as_one_by_one(start):
    run = start({"name": "fedtreelora", "clusters": 2, "warmup_rounds": 1})
    run.rounds(2)
    tasks = run.tasks(("client_000", "client_001", "client_002"), measure=True)
    agree(together(run.worker, tasks), [run.worker.train(task) for task in tasks])


def test_a_resumed_run_has_equal_bits(tmp_path):
    """Stopped after the round that finds the clusters."""
    method = {"name": "fedtreelora", "clusters": 2, "warmup_rounds": 1}
    config = tiny_experiment() | {"method": method, "runtime": "inline", "device": "cpu", "rounds": 3}
    whole = fedray.run(config, output=tmp_path / "whole").summaries[0].state_sha256
    fedray.run(config | {"rounds": 1}, output=tmp_path / "run")
    assert fedray.run(config, resume=tmp_path / "run").summaries[0].state_sha256 == whole


@pytest.mark.parametrize("name", ["warmup_rounds", "clusters", "max_clusters"])
def test_bad_numbers_are_refused(name):
    with pytest.raises(ConfigError, match=f"fedtreelora.{name}: expected at least 1, got 0"):
        FedTreeLora(LORA, **{name: 0})


def test_a_largest_number_beside_a_fixed_one_is_refused():
    with pytest.raises(ConfigError, match="fedtreelora.max_clusters: has no effect without clusters: silhouette"):
        FedTreeLora(LORA, clusters=2, max_clusters=3)


def test_the_only_client_gets_its_own_back():
    found, (update,) = method(), cohort(8, [4])
    server, _ = found.aggregate_train(begun(found, [update]), [update])
    down = received(found, server, [Client("client_0", 0, 4)])["client_0"]
    np.testing.assert_allclose(down.adapter, update.payload.adapter, atol=1e-7)
    assert not down.rest.any()
