"""FedHFT's server against numbers derived by hand, its hyperparameters, and what it sends down."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fedhft_parts import TWO, delta, initial_server, method, update, with_memberships
from received import received

from fedray.adapters.layout import Layout, Slot
from fedray.aggregation.low_rank import LowRank, relative_error
from fedray.errors import ConfigError
from fedray.methods.fedhft import FedHft, MaskedUpdate, Server
from fedray.methods.parts.factors import split
from fedray.methods.parts.wire import decode
from fedray.methods.protocol import Initial, Update
from fedray.storage.state_tree import arrays, num_bytes
from fedray.types import Client


@pytest.mark.parametrize(
    ("normalise", "first", "second"),
    [
        ("membership", [4, 7 / 1.25, 8, 0], [4, 5 / 0.75, 8, 0]),
        ("count", [3, 7 / 2, 4, 0], [1, 5 / 2, 4, 0]),
    ],
)
def test_the_update_of_two_masked_clients(normalise: str, first: list[float], second: list[float]) -> None:
    """Client a has 4 in every row and holds rows 0 and 1, b has 8 and holds rows 1 and 2; π_a = (0.75, 0.25) and
    π_b = (0.5, 0.5). Row 1 of cluster 0: 0.75·4 + 0.5·8 = 7 over 1.25 or over 2; of cluster 1: 0.25·4 + 0.5·8 = 5
    over 0.75 or over 2. Nobody holds row 3. The second target has other masks and ten times the values: row 0 is
    b's alone."""
    fed = method(normalise=normalise)
    server = with_memberships(initial_server(fed, 2), [0.75, 0.25], [0.5, 0.5])
    updates = [
        update("a", [delta([4] * 4), delta([40] * 4)], [[1, 1, 0, 0], [0, 1, 1, 1]]),
        update("b", [delta([8] * 4), delta([80] * 4)], [[0, 1, 1, 0], [1, 0, 0, 0]]),
    ]
    for scale in (1, 2):  # ΔW ← ΔW + ΔU: the second round adds the same again
        server, metrics = fed.aggregate_train(server, updates)
        for j, rows in enumerate((first, second)):
            np.testing.assert_allclose(server.deltas[j][0].dense()[:, 0], np.multiply(scale, rows), rtol=1e-6)
            assert not server.deltas[j][0].dense()[:, 1:].any()
        share = {"membership": (1, 1), "count": (0.5, 0.75)}[normalise]
        np.testing.assert_allclose(
            server.deltas[0][1].dense()[:, 0],
            np.multiply(scale, [80 * share[0], 40 * share[1], 40 * share[1], 40 * share[1]]),
            rtol=1e-6,
        )
    assert metrics == {"cluster_0_size": pytest.approx(1.25), "cluster_1_size": pytest.approx(0.75)}


def test_a_vanishing_membership_counts_as_nobody() -> None:
    """Cluster 1 has 0.0006 + 0.0006 = 0.0012 in row 0, which both clients hold, and 0.0006 < 1e-3 in row 1, which only
    b does: row 0 gets the full mean of 4 and 8, row 1 nothing. The head's weights sum to 0.0012: averaged."""
    fed = method()
    server = with_memberships(initial_server(fed, 2), [0.9994, 0.0006], [0.9994, 0.0006])
    updates = [
        update("a", [delta([4] * 4)] * 2, [[1, 0, 0, 0]] * 2, head=[3] * 6),
        update("b", [delta([8] * 4)] * 2, [[1, 1, 0, 0]] * 2, head=[5] * 6),
    ]
    server, _ = fed.aggregate_train(server, updates)
    np.testing.assert_allclose(server.deltas[0][0].dense()[:, 0], [6, 8, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(server.deltas[1][0].dense()[:, 0], [6, 0, 0, 0], rtol=1e-5)
    np.testing.assert_allclose(server.heads[1], np.full(6, 4), rtol=1e-6)


@pytest.mark.parametrize("normalise", ["membership", "count"])
@pytest.mark.parametrize("server_state", ["full", "rank_q"])
def test_an_empty_cluster_keeps_its_matrix_and_its_head(normalise: str, server_state: str) -> None:
    """Bit for bit, also through many rounds: no factorisation touches it."""
    fed = method(normalise=normalise, server_state=server_state)
    server = with_memberships(initial_server(fed, 2), [0.5, 0.5], [0.5, 0.5])
    rng = np.random.default_rng(0)

    def updates() -> list[Update[MaskedUpdate]]:
        draw = rng.normal(size=(2, TWO.size)).astype(np.float32)
        return [update(id, split(TWO, x), head=x[:6]) for id, x in zip("ab", draw, strict=True)]

    server, _ = fed.aggregate_train(server, updates())
    kept, head = arrays(server.deltas[1]), server.heads[1].copy()
    server = with_memberships(server, [1, 0], [1, 0])
    for _ in range(3):
        server, _ = fed.aggregate_train(server, updates())
    assert {name: x.tobytes() for name, x in arrays(server.deltas[1]).items()} == {
        name: x.tobytes() for name, x in kept.items()
    }
    assert np.array_equal(server.heads[1], head)
    assert np.abs(server.heads[0] - head).max() > 0.01
    below = with_memberships(server, [0.9996, 0.0004], [0.9996, 0.0004])  # sums to 0.0008 < 1e-3
    below, _ = fed.aggregate_train(below, updates())
    assert np.array_equal(below.heads[1], head)
    if normalise == "membership":
        assert np.array_equal(below.deltas[1][0].dense(), server.deltas[1][0].dense())


def test_a_first_cluster_that_is_empty_does_not_hide_the_others() -> None:
    """Everybody in cluster 1: what it learned in round 0 reaches the clients in round 1."""
    fed = method()
    server = with_memberships(initial_server(fed, 2), [0, 1], [0, 1])
    server, _ = fed.aggregate_train(server, [update(id, [delta([4] * 4)] * 2) for id in "ab"])
    mixture = received(fed, server, [Client("a", 0, 5)])["a"]
    assert mixture.rest is not None
    assert not server.deltas[0][0].dense().any()
    np.testing.assert_allclose(split(TWO, decode(mixture.rest))[0].dense()[:, 0], [4] * 4, rtol=1e-6)


def test_the_downlink_is_the_mixture_truncated_to_one_rank_for_all() -> None:
    """Against a dense SVD of Σ_j π_kj ΔW_j for ranks below, at and above that of ΔW (3); the size is r (3 + 4) per
    target whatever ΔW's rank. Round 0 sends no factors; clients of equal π share one object."""
    rng = np.random.default_rng(2)
    deltas = [[LowRank(*(rng.normal(size=s).astype("f4") for s in ((4, 3), (3, 3)))) for _ in "qv"] for _ in range(2)]
    clients = [Client(id, i, 5) for i, id in enumerate("abc")]
    for rank in (1, 2, 3, 5, None):
        fed = method(downlink_rank=rank)
        server = with_memberships(initial_server(fed, 3), [0.75, 0.25], [0, 1], [0, 1])
        assert {m.rest is None for m in received(fed, server, clients).values()} == {True}
        server = replace(server, deltas=tuple(map(tuple, deltas)), server_round=1)
        down = received(fed, server, clients)
        assert down["b"] is down["c"]
        q = rank or 2
        layout = Layout(
            tuple(Slot(m, part, shape) for m in "qv" for part, shape in (("A", (q, 3)), ("B", (4, q)))),  # type: ignore[arg-type]
        )
        for id, pi in server.memberships.items():
            assert down[id].rest.nbytes == 4 * 2 * q * 7
            for target, found in enumerate(split(layout, down[id].rest)):
                dense = sum(p * d[target].dense().astype(np.float64) for p, d in zip(pi, deltas, strict=True))
                u, s, vt = np.linalg.svd(dense)
                expected = (u[:, : min(q, 3)] * s[:q]) @ vt[:q]
                np.testing.assert_allclose(found.dense(), expected, rtol=0, atol=1e-5)


def test_heads_are_averaged_per_cluster_and_mixed_per_client() -> None:
    """Heads 1 and 4 with π = (1, 0) and (0.5, 0.5): cluster 0 gets (1 + 0.5·4) / 1.5 = 2, cluster 1 gets 4; client b
    then starts from 0.5·2 + 0.5·4 = 3. Examples do not weigh."""
    fed = method()
    server = with_memberships(initial_server(fed, 2), [1, 0], [0.5, 0.5])
    updates = [update("a", [delta([1] * 4)] * 2, head=[1] * 6), update("b", [delta([1] * 4)] * 2, head=[4] * 6)]
    updates[0] = replace(updates[0], num_examples=500)
    server, _ = fed.aggregate_train(server, updates)
    assert [head.tolist() for head in server.heads] == [[2] * 6, [4] * 6]
    down = received(fed, server, [update_.client for update_ in updates])
    assert down["a"].head.tolist() == [2] * 6
    assert down["b"].head.tolist() == [3] * 6


def test_rank_q_bounds_the_server_and_says_what_that_costs() -> None:
    """20 rounds of noise on 30 x 20 matrices. `full` reaches the rank 20 of the dense sum, losslessly; `rank_q` stays
    at q = 3, and the error of each round's truncation is sqrt(Σ_{i>q} σ_i² / Σ σ_i²) of the dense sum, the larger one
    of the two targets'. What is left in the end differs from `full` by more than one truncation's error."""
    layout = Layout(
        tuple(Slot(m, part, shape) for m in "qv" for part, shape in (("A", (2, 20)), ("B", (30, 2))))  # type: ignore[arg-type]
    )
    rng = np.random.default_rng(4)
    base = Initial(0, {"lora": layout}, {"lora": np.zeros(layout.size, np.float32)})
    client = Client("a", 0, 5)
    full, small = method(clusters=1), method(clusters=1, server_state="rank_q", server_rank=3)
    servers = [fed.init_server(base, [client]) for fed in (full, small)]
    total = [np.zeros((30, 20)), np.zeros((30, 20))]
    for _ in range(20):
        vector = rng.normal(size=layout.size).astype(np.float32)
        sent = [Update(client, 5, MaskedUpdate(vector, None, None))]
        held = [d.dense() + u.dense() for d, u in zip(servers[1].deltas[0], split(layout, vector), strict=True)]
        total = [x + u.dense() for x, u in zip(total, split(layout, vector), strict=True)]
        (servers[0], plain), (servers[1], metrics) = (
            fed.aggregate_train(server, sent) for fed, server in zip((full, small), servers, strict=True)
        )
        s = np.stack([np.linalg.svd(x, compute_uv=False) for x in held])
        errors = np.sqrt((s[:, 3:] ** 2).sum(axis=1) / (s**2).sum(axis=1))
        assert "truncation_error" not in plain
        assert metrics["truncation_error"] == pytest.approx(errors.max(), rel=1e-4, abs=1e-6)
    assert [x.rank for x in servers[1].deltas[0]] == [3, 3]
    for exact, kept, dense in zip(servers[0].deltas[0], servers[1].deltas[0], total, strict=True):
        assert exact.rank == 20
        np.testing.assert_allclose(exact.dense(), dense, rtol=0, atol=1e-4)
        by_hand = np.linalg.norm(kept.dense() - dense) / np.linalg.norm(dense)
        assert relative_error(kept, exact) == pytest.approx(by_hand, rel=1e-4)
        assert by_hand > errors.max() > 0.04
    assert [x.rank for x in one_round(method(server_state="rank_q")).deltas[0]] == [2, 2]  # default: the LoRA's


def one_round(fed: FedHft) -> Server:
    server = initial_server(fed, 3)
    vectors = np.random.default_rng(1).normal(size=(3, TWO.size)).astype(np.float32)
    sent = [update(id, split(TWO, vector)) for id, vector in zip("abc", vectors, strict=True)]
    return fed.aggregate_train(server, sent)[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"clusters": 0}, "fedhft.clusters: expected `auto` or at least 1, got 0"),
        ({"timing": "pre", "importance": "fisher"}, "fedhft.importance: .*use `energy` with timing `pre`"),
        ({"features": "head", "head": "local"}, "fedhft.features: `head` needs head: shared, got head: local"),
        ({"server_rank": 0}, "fedhft.server_rank: expected at least 1, got 0"),
        ({"downlink_rank": 0}, "fedhft.downlink_rank: expected at least 1, got 0"),
        ({"n_init": 0}, "fedhft.n_init: expected at least 1, got 0"),
        ({"max_clusters": 0}, "fedhft.max_clusters: expected at least 1, got 0"),
        ({"warmup_rounds": -1}, "fedhft.warmup_rounds: expected at least 0, got -1"),
    ],
)
def test_values_that_make_no_sense_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        method(**fields)


def test_the_papers_defaults() -> None:
    fed = method()
    assert (fed.warmup_rounds, fed.timing, fed.normalise, fed.server_state) == (5, "post", "membership", "full")


def test_every_byte_of_a_mixture_is_counted() -> None:
    """Rank 2 factors 2·2·(3 + 4) = 28, head 6, π 2: 36 float32."""
    fed = method()
    server = one_round(fed)
    (down,) = received(fed, server, [Client("a", 0, 5)]).values()
    assert num_bytes(down) == 4 * (28 + 6 + 2)
