"""FedHFT's clusters over LoReFT: mixtures down, means weighted by memberships up, and what one cluster is."""

from dataclasses import replace

import numpy as np
import pytest
from received import received
from scipy.linalg import polar

from fedray.errors import ConfigError
from fedray.methods.bases.shared_adapter import GlobalAdapter
from fedray.methods.fedhft_reft import FedHftReft

IDS = ("client_000", "client_001", "client_002")
PI = {
    "client_000": np.array([1, 0], np.float32),
    "client_001": np.array([0.25, 0.75], np.float32),
    "client_002": np.array([0, 1], np.float32),
}


def retracted(layout, vector):
    parts = [polar(view)[0] if slot.part == "R" else view for slot, view in layout.items(vector.astype(np.float32))]
    return np.concatenate([part.reshape(-1) for part in parts])


def test_one_cluster_is_uniform_fedavg(start):
    run = start({"name": "fedhft_reft", "clusters": 1, "warmup_rounds": 0})
    plain = start({"name": "fedavg", "adapter": "reft", "weights": "uniform"})
    for _ in range(3):
        run.round()
        plain.round()
        (cluster,) = run.server.clusters
        np.testing.assert_allclose(cluster.adapter, plain.server.shared.adapter, atol=1e-5)
        np.testing.assert_allclose(cluster.head, plain.server.shared.head, atol=1e-5)


def test_two_rounds_by_hand(start):
    """Memberships 1, 1/4 and 0 in the first cluster: φ_0 = (φ_a + φ_b/4)/1.25, φ_1 = (0.75 φ_b + φ_c)/1.75, and b
    receives 0.25 φ_0 + 0.75 φ_1, all retracted; heads alike."""
    run = start({"name": "fedhft_reft", "warmup_rounds": 9})
    layout = run.server.layout
    run.federation.server = replace(run.server, memberships=PI)
    for _ in range(2):
        a, b, c = (result.payload for result in run.serve().values())
        done = run.round()
        size = layout.size + run.initial.layouts["head"].size
        assert all(result.uplink_bytes == result.downlink_bytes == 4 * size for result in done.results)
        one, two = run.server.clusters
        np.testing.assert_allclose(one.adapter, retracted(layout, (a.adapter + b.adapter / 4) / 1.25), atol=1e-5)
        np.testing.assert_allclose(two.adapter, retracted(layout, (0.75 * b.adapter + c.adapter) / 1.75), atol=1e-5)
        np.testing.assert_allclose(two.head, (0.75 * b.head + c.head) / 1.75, atol=1e-6)
        down = received(run.method, run.server, run.prepared.clients)
        mixed = 0.25 * one.adapter + 0.75 * two.adapter
        np.testing.assert_allclose(down[IDS[1]].adapter, retracted(layout, mixed), atol=1e-5)
        np.testing.assert_allclose(down[IDS[1]].head, 0.25 * one.head + 0.75 * two.head, atol=1e-6)
        np.testing.assert_allclose(down[IDS[0]].adapter, one.adapter, atol=1e-5)
        assert done.metrics == {"cluster_0_size": 1.25, "cluster_1_size": 1.75}


def test_a_cluster_without_clients_stays(start):
    run = start({"name": "fedhft_reft", "warmup_rounds": 9})
    run.round()
    alone = dict.fromkeys(IDS, np.array([1, 0], np.float32))
    run.federation.server = replace(run.server, memberships=alone)
    before = run.server.clusters[1]
    run.round()
    assert run.server.clusters[1] is before
    assert run.method.aggregate_train(run.server, [])[0] is run.server


@pytest.mark.parametrize("features", ["head", "reft"])
def test_planted_groups_are_found(start, clients, paper, updates, features):
    """Clients a, b, c send one intervention and head, d and e others, with little noise: two clusters."""
    rng = np.random.default_rng(0)
    method = FedHftReft(reft=start("local").config.reft, warmup_rounds=0, features=features)
    server = method.init_server(paper, clients)
    centres = [(rng.normal(size=server.layout.size), rng.normal(size=3)) for _ in range(2)]
    for _ in range(2):
        payloads = [
            GlobalAdapter(*(np.float32(x + 0.01 * rng.normal(size=x.shape)) for x in centres[client.id in "de"]))
            for client in clients
        ]
        server, metrics = method.aggregate_train(server, updates(clients, payloads))
    found = [int(server.memberships[client.id].argmax()) for client in clients]
    assert len(server.clusters) == len(metrics) == 2
    assert found in ([0, 0, 0, 1, 1], [1, 1, 1, 0, 0])
    for j, centre in ((found[0], centres[0]), (found[4], centres[1])):
        np.testing.assert_allclose(server.clusters[j].head, centre[1], atol=0.05)


def test_tiers_that_edit_other_layers(start):
    """A layer that one client edits is that client's; features of unequal size are completed by what was received."""
    deep, both = {"clients": [IDS[0]], "reft_layers": [1]}, {"clients": list(IDS[1:])}
    run = start(
        {"name": "fedhft_reft", "warmup_rounds": 0, "features": "reft"}, clients__tiers={"deep": deep, "both": both}
    )
    done = run.rounds(2)[-1]
    sizes = [result.uplink_bytes for result in done.results]
    assert sizes[0] < sizes[1] == sizes[2]
    assert {vector.size for vector in run.server.features.values()} == {run.server.layout.size}


def test_a_layer_whose_holders_hardly_belong_to_a_cluster_stays(start):
    """Only client 0 edits layer 0; its share of cluster 1 is 1e-4. Both layers of cluster 0 move."""
    both, deep = {"clients": [IDS[0]]}, {"clients": list(IDS[1:]), "reft_layers": [1]}
    run = start({"name": "fedhft_reft", "warmup_rounds": 9}, clients__tiers={"both": both, "deep": deep})
    shares = np.array([0.9999, 0.0001], np.float32)
    run.federation.server = replace(run.server, memberships={**PI, IDS[0]: shares})
    layout, before = run.server.layout, run.server.clusters
    run.round()
    for moves, old, new in zip(((True, True), (False, True)), before, run.server.clusters, strict=True):
        change = layout.views(np.abs(new.adapter - old.adapter))
        for layer, moved in enumerate(moves):
            largest = max(view.max() for name, view in change.items() if f"layer.{layer}." in name)
            assert (largest > 1e-3) == moved


def test_mistakes_are_named(start):
    model = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128}
    with pytest.raises(ConfigError, match="method fedhft_reft with features: head: needs a task head"):
        start({"name": "fedhft_reft", "features": "head"}, task="causal_lm", model__config=model)
    with pytest.raises(ConfigError, match="fedhft_reft.features: `head` needs head: shared, got local"):
        start({"name": "fedhft_reft", "features": "head", "head": "local"})
    with pytest.raises(ConfigError, match="fedhft_reft.max_clusters: has no effect without clusters: auto"):
        start({"name": "fedhft_reft", "max_clusters": 3})
    with pytest.raises(ConfigError, match="fedhft_reft.clusters: expected at least 1, got 0"):
        start({"name": "fedhft_reft", "clusters": 0})
