"""FedHFT's memberships: when clusters are refitted, from what, and that planted groups are found."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fedhft_parts import IDS, TWO, initial_server, method, update
from sklearn.metrics import adjusted_rand_score

from fedray.aggregation.low_rank import LowRank
from fedray.methods.fedhft import MaskedUpdate, Server
from fedray.methods.parts.factors import split
from fedray.methods.parts.soft_clusters import similarity
from fedray.methods.protocol import Update


def grouped(groups: Sequence[int], seed: int = 0) -> dict[str, Update[MaskedUpdate]]:
    """Updates whose heads lie around one centre per group, ten deviations apart, and whose products are noise."""
    rng = np.random.default_rng(seed)
    centres = 10 * np.eye(6)[:3]
    found = {}
    for id, group in zip(IDS, groups, strict=False):
        vector = rng.normal(size=TWO.size).astype(np.float32)
        found[id] = update(id, split(TWO, vector), head=centres[group] + 0.1 * rng.normal(size=6))
    return found


def hardest(server: Server, ids: str) -> list[int]:
    return [int(server.memberships[id].argmax()) for id in ids]


@pytest.mark.parametrize("J", [1, 2, 3])
def test_memberships_start_uniform(J: int) -> None:
    server = initial_server(method(clusters=J), 4)
    assert set(server.memberships) == set("abcd")
    assert all(np.array_equal(pi, np.full(J, 1 / J, np.float32)) for pi in server.memberships.values())
    assert len(server.deltas) == len(server.heads) == J


@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_the_first_refit_ends_the_round_after_the_warmup(warmup: int) -> None:
    """5, the default, means the sixth round: π is uniform after the fifth and one-hot after the sixth."""
    fed = method() if warmup == 5 else method(warmup_rounds=warmup)
    server, updates = initial_server(fed, 4), list(grouped([0, 1, 1, 0]).values())
    for server_round in range(warmup + 1):
        assert all(np.array_equal(pi, [0.5, 0.5]) for pi in server.memberships.values()), server_round
        server, metrics = fed.aggregate_train(server, updates)
    assert adjusted_rand_score([0, 1, 1, 0], hardest(server, "abcd")) == 1
    assert all(pi.max() > 0.99 and pi.sum() == pytest.approx(1) for pi in server.memberships.values())
    assert metrics == {"cluster_0_size": pytest.approx(2, abs=0.05), "cluster_1_size": pytest.approx(2, abs=0.05)}


def test_clients_that_have_never_taken_part_keep_their_memberships() -> None:
    """e and f never come; d comes once and is refitted from its latest update while it sits out."""
    fed = method(warmup_rounds=1)
    server, updates = initial_server(fed, 6), grouped([0, 1, 1, 0])
    server, _ = fed.aggregate_train(server, [updates[id] for id in "abcd"])
    server = replace(server, memberships={**server.memberships, "f": np.array([0.9, 0.1], np.float32)})
    server, metrics = fed.aggregate_train(server, [updates[id] for id in "abc"])
    assert hardest(server, "a") == hardest(server, "d") != hardest(server, "b") == hardest(server, "c")
    assert server.memberships["d"].max() > 0.99
    assert server.memberships["e"].tolist() == [0.5, 0.5]
    assert server.memberships["f"].tolist() == pytest.approx([0.9, 0.1])
    assert sum(metrics.values()) == pytest.approx(6)


def test_a_round_without_updates_changes_nothing_but_its_number() -> None:
    fed = method(warmup_rounds=0)
    server, _ = fed.aggregate_train(initial_server(fed, 4), list(grouped([0, 1, 1, 0]).values()))
    after, metrics = fed.aggregate_train(server, [])
    assert after == replace(server, server_round=2)
    assert metrics == {}


def test_clusters_keep_their_numbers() -> None:
    """The mixture's own numbering is arbitrary: over ten refits with other seeds everybody stays in his cluster."""
    fed = method(warmup_rounds=0, clusters=3)
    groups = [0, 1, 2, 0, 1, 2, 0, 1, 2]
    server, updates = initial_server(fed, 9), list(grouped(groups).values())
    server, _ = fed.aggregate_train(server, updates)
    found = hardest(server, IDS[:9])
    assert adjusted_rand_score(groups, found) == 1
    for _ in range(10):
        server, _ = fed.aggregate_train(server, updates)
        assert hardest(server, IDS[:9]) == found


def test_auto_picks_the_planted_number_and_keeps_it() -> None:
    """Three groups of four. The clusters begin as copies of the one that was, and part from then on."""
    fed = method(clusters="auto", warmup_rounds=1)
    groups = [0, 1, 2] * 4
    server, updates = initial_server(fed, 12), list(grouped(groups).values())
    server, _ = fed.aggregate_train(server, updates)
    assert len(server.deltas) == 1
    server, _ = fed.aggregate_train(server, updates)
    assert len(server.deltas) == len(server.heads) == 3
    assert adjusted_rand_score(groups, hardest(server, IDS)) == 1
    assert all(np.array_equal(server.heads[0], head) for head in server.heads)
    server, _ = fed.aggregate_train(server, updates)
    assert len(server.deltas) == 3
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(server.heads[a] - server.heads[b]).max() > 5
        assert np.abs(server.deltas[a][0].dense() - server.deltas[b][0].dense()).max() > 0.1


def test_auto_finds_one_group_where_there_is_one() -> None:
    fed = method(clusters="auto", warmup_rounds=0, max_clusters=4)
    server, _ = fed.aggregate_train(initial_server(fed, 12), list(grouped([0] * 12).values()))
    assert len(server.deltas) == 1
    assert all(pi.tolist() == [1] for pi in server.memberships.values())


@pytest.mark.parametrize("features", [None, "head", "lora"])
def test_features_are_the_head_or_the_products(features: Any) -> None:
    """Heads say a, b | c, d and products say a, c | b, d. Every client writes its product with factors of its own,
    (B M⁻¹, M A) with another M: only products can tell. Default: the head."""
    fed = method(warmup_rounds=0, features=features)
    rng = np.random.default_rng(5)
    products = [split(TWO, rng.normal(size=TWO.size).astype(np.float32)) for _ in range(2)]
    updates = []
    for id, head, product in (("a", 0, 0), ("b", 0, 1), ("c", 9, 0), ("d", 9, 1)):
        M = rng.normal(size=(2, 2)) + 3 * np.eye(2)
        factors = [
            LowRank((x.B @ np.linalg.inv(M)).astype(np.float32), (M @ x.A).astype(np.float32))
            for x in products[product]
        ]
        updates.append(update(id, factors, head=np.full(6, head) + 0.01 * rng.normal(size=6)))
    server, _ = fed.aggregate_train(initial_server(fed, 4), updates)
    expected = [0, 1, 0, 1] if features == "lora" else [0, 0, 1, 1]
    assert adjusted_rand_score(expected, hardest(server, "abcd")) == 1


def test_without_a_shared_head_products_are_clustered() -> None:
    fed = method(warmup_rounds=0, head="local")
    rng = np.random.default_rng(6)
    products = [split(TWO, rng.normal(size=TWO.size).astype(np.float32)) for _ in range(2)]
    updates = [replace(update(id, products[g])) for id, g in zip("abcd", (0, 1, 1, 0), strict=True)]
    updates = [replace(u, payload=replace(u.payload, head=None)) for u in updates]
    server, _ = fed.aggregate_train(initial_server(fed, 4), updates)
    assert server.heads == ()
    assert adjusted_rand_score([0, 1, 1, 0], hardest(server, "abcd")) == 1


def test_similarity_is_the_centred_gram_matrix_of_dense_products() -> None:
    rng = np.random.default_rng(7)
    clients = [split(TWO, x) for x in rng.normal(size=(5, TWO.size)).astype(np.float32)]
    dense = np.stack([np.concatenate([x.dense().ravel() for x in client]) for client in clients]).astype(np.float64)
    centred = dense - dense.mean(axis=0)
    np.testing.assert_allclose(similarity(clients), centred @ centred.T, rtol=0, atol=1e-4)
    heads = [row.astype(np.float32) for row in dense]
    np.testing.assert_allclose(similarity(heads), centred @ centred.T, rtol=0, atol=1e-4)
