"""IFCA: who is in which cluster, the means of clusters by hand, and planted groups that are found."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from fedray.config import LoraSection
from fedray.errors import ConfigError
from fedray.methods.bases.shared_adapter import GlobalAdapter
from fedray.methods.ifca import Chosen, Ifca, Member, Models
from fedray.types import Client


def ifca(**options):
    return Ifca(lora=LoraSection(rank=2), **options)


def test_one_cluster_is_fedavg(start):
    """One model, and nothing to choose. The updates have the same bits; FedAvg's mean is taken along a tree."""
    run, fedavg = (start(method, train__optimizer="sgd") for method in ({"name": "ifca", "clusters": 1}, "fedavg"))
    for id, result in run.serve().items():
        assert np.array_equal(result.payload.model.adapter, fedavg.serve(id)[id].payload.adapter)
    run.rounds(3)
    fedavg.rounds(3)
    (model,) = run.server.models
    np.testing.assert_allclose(model.adapter, fedavg.server.shared.adapter, atol=1e-6)
    np.testing.assert_allclose(model.head, fedavg.server.shared.head, atol=1e-6)


@pytest.mark.parametrize(("clusters", "number"), [(2, 8), (3, 9), (4, 10)])
def test_clients_are_assigned_equally_and_at_random(paper, clusters, number):
    """Ten clients in four clusters: two or three in each. Another seed assigns them otherwise."""
    method = ifca(clusters=clusters)
    many = [Client(f"c{i}", i, 1) for i in range(number)]
    assigned = [method.init_client(paper, client).cluster for client in many]
    sizes = Counter(assigned)
    assert set(sizes) == set(range(clusters))
    assert max(sizes.values()) - min(sizes.values()) <= 1
    others = [method.init_client(replace(paper, seed=seed), client).cluster for seed in range(3) for client in many]
    assert others != assigned * 3


def test_models_begin_as_one_function_with_factors_of_their_own(start):
    """B = 0 in all; the first is the common draw."""
    run = start({"name": "ifca", "clusters": 3})
    layout = run.initial.layouts["lora"]
    vectors = [model.adapter for model in run.server.models]
    assert np.array_equal(vectors[0], run.initial.vectors["lora"])
    a = layout.mask({"A"})
    assert all(not vector[~a].any() for vector in vectors)
    assert len({vector[a].tobytes() for vector in vectors}) == 3
    assert all(np.array_equal(model.head, run.initial.head()) for model in run.server.models)


def served(paper, vector_adapter, fake_local, losses, cluster, server_round):
    """What a client sends whose training adds 1, if its losses of models 0, 1, 2 are these."""
    models = tuple(GlobalAdapter(np.full(28, 10.0 * j, np.float32), np.full(3, j, np.float32)) for j in range(3))
    adapter = vector_adapter(paper)

    def training(adapter):
        adapter.load("lora", adapter.read("lora") + 1)

    local = fake_local(
        Client("a", 0, 1), adapter, training, lambda a: losses[int(a.read("head")[0])], server_round=server_round
    )
    return ifca(clusters=3).train_client(adapter, Member(None, cluster), Models(models), local), local


@pytest.mark.parametrize(
    ("losses", "had", "chosen"),
    [
        ((3.0, 1.0, 2.0), 0, 1),
        ((3.0, 1.0, 1.0), 0, 1),  # a tie that the client was not part of: the first
        ((3.0, 1.0, 1.0), 2, 2),  # a tie keeps the client where it was
        ((1.0, 1.0, 1.0), 1, 1),
    ],
)
def test_a_client_trains_the_model_of_least_loss(paper, vector_adapter, fake_local, losses, had, chosen):
    (sent, state), local = served(paper, vector_adapter, fake_local, losses, had, server_round=1)
    assert sent.cluster == state.cluster == local.recorded["cluster"] == chosen
    assert set(sent.model.adapter) == {10.0 * chosen + 1}
    assert set(sent.model.head) == {chosen}
    assert local.evaluated == ["train"] * 3


def test_nothing_is_chosen_in_the_first_round(paper, vector_adapter, fake_local):
    (sent, state), local = served(paper, vector_adapter, fake_local, (3.0, 1.0, 2.0), 2, server_round=0)
    assert sent.cluster == state.cluster == 2
    assert local.evaluated == []


@pytest.mark.parametrize("weights", ["examples", "uniform"])
def test_each_cluster_has_its_members_mean(paper, clients, spread, updates, weights):
    """a, c, e (1, 3, 5 examples) chose model 0, b and d (2, 4) model 2, and nobody model 1, which stays as it is."""
    method, points, heads = ifca(clusters=3, weights=weights), spread(5, 28), spread(5, 3)
    server = method.init_server(paper, clients)
    chosen = [0, 2, 0, 2, 0]
    payloads = [Chosen(GlobalAdapter(p, h), j) for p, h, j in zip(points, heads, chosen, strict=True)]
    after, metrics = method.aggregate_train(server, updates(clients, payloads))
    w = np.array([1, 2, 3, 4, 5]) if weights == "examples" else np.ones(5)
    for j, members in ((0, [0, 2, 4]), (2, [1, 3])):
        for found, sent in ((after.models[j].adapter, points), (after.models[j].head, heads)):
            expected = sum(w[k] * sent[k].astype(np.float64) for k in members) / w[members].sum()
            np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.array_equal(after.models[1].adapter, server.models[1].adapter)
    assert np.array_equal(after.models[1].head, server.models[1].head)
    assert metrics == {"cluster_0_size": 3.0, "cluster_1_size": 0.0, "cluster_2_size": 2.0}


def test_a_whole_round_is_the_means_of_what_was_trained(start):
    """9, 5 and 7 examples; the second round chooses by losses that are measured here once more."""
    run = start({"name": "ifca", "clusters": 2}, lora__dropout=0.0)
    run.round()
    models, before = run.server.models, run.states()
    served = run.serve()
    for id, result in served.items():
        losses = []
        for model in models:
            run.adapter.load("lora", model.adapter)
            run.adapter.load("head", model.head)
            losses.append(loss_on_training_data(run, id))
        if abs(losses[0] - losses[1]) > 1e-6:
            assert result.payload.cluster == int(np.argmin(losses))
        else:
            assert result.payload.cluster == before[id].cluster
    run.round()
    sizes = {"client_000": 9, "client_001": 5, "client_002": 7}
    for j, model in enumerate(run.server.models):
        members = {id: result.payload.model for id, result in served.items() if result.payload.cluster == j}
        if not members:
            assert np.array_equal(model.adapter, models[j].adapter)
            continue
        total = sum(sizes[id] for id in members)
        expected = sum(sizes[id] * sent.adapter.astype(np.float64) for id, sent in members.items()) / total
        np.testing.assert_allclose(model.adapter, expected, atol=1e-6)
    assert {id: state.cluster for id, state in run.states().items()} == {
        id: result.payload.cluster for id, result in served.items()
    }


def loss_on_training_data(run, id):
    from fedray.evaluation.evaluate import evaluate
    from fedray.evaluation.metrics import configured_metric

    config = run.config
    metric = configured_metric(config)
    table = run.pool.shards[id].tables["train"]
    return evaluate(run.adapter.model, table, config.task, [metric], 32, run.prepared.data.pad_token_id, "cpu").loss


def test_planted_groups_are_found(start):
    """Two groups of four clients whose labels contradict each other: from random clusters to the groups."""
    run = start(
        {"name": "ifca", "clusters": 2},
        seed=4,
        clients__count=8,
        data__groups=2,
        data__examples_per_client=60,
        data__max_length=80,
        model__config__num_hidden_layers=1,
        train__epochs=3,
        train__lr=0.02,
        train__weight_decay=0.0,
        lora__rank=4,
        lora__dropout=0.0,
    )
    run.rounds(7)
    found = {id: state.cluster for id, state in run.states().items()}
    groups = [run.prepared.data.latent_group[id] for id in found]
    assert len(set(groups)) == 2
    first = [run.method.init_client(run.initial, client).cluster for client in run.prepared.clients]
    assert adjusted_rand_score(groups, first) < 0.5
    assert adjusted_rand_score(groups, list(found.values())) >= 0.95


def test_a_number_of_clusters_that_cannot_be():
    with pytest.raises(ConfigError, match="ifca.clusters: expected at least 1, got 0"):
        ifca(clusters=0)
