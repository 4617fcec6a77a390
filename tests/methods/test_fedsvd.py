"""FedSVD: the mean of the products is exact, and its factors have orthonormal rows of A."""

from dataclasses import replace

import numpy as np
import pytest
from lora_clients import INITIAL, LAYOUT, LORA, cohort, factors, mean_head, products, shares
from received import received

from fedray.adapters.draws import draw_frames
from fedray.adapters.layout import Layout, Slot
from fedray.aggregation.low_rank import LowRank
from fedray.errors import ConfigError
from fedray.methods.bases.shared_adapter import GlobalAdapter
from fedray.methods.fedsvd import FedSvd, orthonormal
from fedray.methods.parts.capacity import own_layout
from fedray.methods.protocol import TierMean, Update

FEDSVD = FedSvd(adapter=LORA)
SGD = {"train__optimizer": "sgd", "train__lr": 0.5}


def only_b(updates):
    """The same updates as FedSVD's clients send them, and their B by target."""
    found, matrices = [], []
    for update in updates:
        own = [b for _, b in factors(own_layout(LAYOUT, update.capacity), update.payload.adapter)]
        sent = np.concatenate([b.ravel() for b in own]).astype(np.float32)
        found.append(Update(update.client, update.num_examples, GlobalAdapter(sent, update.payload.head)))
        matrices.append(own)
    return found, list(zip(*matrices, strict=True))


def start_server():
    return FEDSVD.init_server(INITIAL, [])


def aggregated(updates, server=None):
    return FEDSVD.aggregate_train(server or start_server(), updates)[0]


def assert_orthonormal(a):
    np.testing.assert_allclose(a @ a.T, np.eye(len(a)), atol=1e-6)


def assert_svd(pair, product, atol=1e-6):
    """A = Vᵀ and B = U Σ of a dense matrix, up to the signs of the components."""
    a, b = pair
    assert_orthonormal(a)
    np.testing.assert_allclose(b @ a, product, atol=atol)
    np.testing.assert_allclose(b.T @ b, np.diag(np.linalg.svd(product)[1][: len(a)] ** 2), atol=10 * atol)


def test_a_round_by_hand():
    """Weights 1, 2 and 5: Σ w_k B_k A_0, and its dense SVD."""
    updates, matrices = only_b(cohort(0, (1, 2, 5)))
    server = aggregated(updates)
    old, new = (factors(LAYOUT, vector) for vector in (INITIAL.vectors["lora"], server.shared.adapter))
    for (a, _), pair, b in zip(old, new, matrices, strict=True):
        assert_svd(pair, sum(w * x @ a for w, x in zip(shares(updates), b, strict=True)))
    np.testing.assert_allclose(server.shared.head, mean_head(updates), atol=1e-6)


def test_the_rows_of_a_span_what_those_of_the_first_draw_span():
    """The projection on them stays A_0⁺ A_0, round after round."""
    server = start_server()
    for seed in range(4):
        server = aggregated(only_b(cohort(seed, (3, 4)))[0], server)
        for (first, _), (a, _) in zip(
            factors(LAYOUT, INITIAL.vectors["lora"]), factors(LAYOUT, server.shared.adapter), strict=True
        ):
            np.testing.assert_allclose(a.T @ a, np.linalg.pinv(first) @ first, atol=2e-6)


def test_one_client_or_equal_ones_get_their_product_back():
    (update,), matrices = only_b(cohort(2, (4,)))
    for updates in ([update], [replace(update, client=replace(update.client, id=id)) for id in "abc"]):
        found = products(LAYOUT, aggregated(updates).shared.adapter)
        for product, (a, _), (b,) in zip(found, factors(LAYOUT, INITIAL.vectors["lora"]), matrices, strict=True):
            np.testing.assert_allclose(product, b @ a, atol=1e-6)


def test_no_update_changes_nothing():
    server = aggregated(only_b(cohort(4, (1, 2)))[0])
    assert aggregated([], server) is server


@pytest.mark.parametrize("shape", [(9, 3, 7), (2, 3, 7), (9, 3, 3)])
@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_components_without_a_singular_value_are_alive(shape, rank):
    """B of rank 0, of rank below r, and with fewer rows than r: A still has orthonormal rows, and B is 0 there."""
    d_out, r, d_in = shape
    rng = np.random.default_rng(rank)
    b = (rng.normal(size=(d_out, rank)) @ rng.normal(size=(rank, r))).astype(np.float32)
    a = rng.normal(size=(r, d_in)).astype(np.float32)
    x = orthonormal(LowRank(B=b, A=a))
    assert (x.B.shape, x.A.shape) == (b.shape, a.shape)
    alive = min(d_out, rank)
    assert_orthonormal(x.A.astype(np.float64))
    np.testing.assert_allclose(x.B.astype(np.float64) @ x.A, b.astype(np.float64) @ a, atol=2e-6)
    assert (np.linalg.norm(x.B, axis=0)[:alive] > 0.1).all()
    np.testing.assert_allclose(x.B[:, alive:], 0, atol=2e-6)


def test_a_component_is_the_mean_of_those_that_hold_it():
    """Ranks 1, 3 and 2, weights n_k: B̄'s first column is the mean of three clients, its last that of one."""
    server = aggregated(only_b(cohort(5, (3, 4)))[0])
    updates, matrices = only_b(cohort(6, (9, 5, 7), (1, None, 2)))
    after = aggregated(updates, server)
    old, new = (factors(LAYOUT, one.shared.adapter) for one in (server, after))
    for (a, _), pair, (x, y, z) in zip(old, new, matrices, strict=True):
        columns = [
            (9 * x[:, 0] + 5 * y[:, 0] + 7 * z[:, 0]) / 21,
            (5 * y[:, 1] + 7 * z[:, 1]) / 12,
            y[:, 2],
        ]
        assert_svd(pair, np.stack(columns, axis=1) @ a)


def test_what_no_client_holds_stays():
    """A cohort of rank 1: of the other components only the coordinates change."""
    server = aggregated(only_b(cohort(7, (3, 4)))[0])
    updates, matrices = only_b(cohort(8, (2, 2), (1, 1)))
    old, new = (factors(LAYOUT, one.shared.adapter) for one in (server, aggregated(updates, server)))
    for (a, b), pair, (x, y) in zip(old, new, matrices, strict=True):
        assert_svd(pair, (x + y) / 2 @ a[:1] + b[:, 1:] @ a[1:])


def test_a_tier_receives_the_best_approximation_of_its_rank():
    server = aggregated(only_b(cohort(9, (1, 2)))[0])
    (update, _) = cohort(9, (1, 2))
    down = received(FEDSVD, server, [replace(update.client, capacity={"lora_rank": 2})])[update.client.id]
    found = products(own_layout(LAYOUT, {"lora_rank": 2}), down.adapter)
    for product, whole in zip(found, products(LAYOUT, server.shared.adapter), strict=True):
        u, s, vt = np.linalg.svd(whole)
        np.testing.assert_allclose(product, (u[:, :2] * s[:2]) @ vt[:2], atol=1e-6)


def test_means_of_tiers_are_as_good_as_their_clients():
    updates, _ = only_b(cohort(10, (9, 5, 7), (None, 2, 2)))
    strong, *weak = updates
    w = np.array([5, 7], np.float64) / 12
    mean = GlobalAdapter(
        *(
            (w @ np.stack([getattr(update.payload, name) for update in weak])).astype(np.float32)
            for name in ("adapter", "head")
        )
    )
    tiers = [
        TierMean("strong", {}, 9, 1, strong.payload),
        TierMean("weak", {"lora_rank": 2}, 12, 2, mean),
    ]
    one, other = aggregated(updates), aggregated(tiers)
    for found, expected in zip(
        products(LAYOUT, other.shared.adapter), products(LAYOUT, one.shared.adapter), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=2e-6)
    np.testing.assert_allclose(other.shared.head, one.shared.head, atol=1e-6)


def test_two_real_rounds(start):
    """Clients train B and the head, receive both factors, and send B; the server has the mean of their products."""
    run = start("fedsvd", train__weight_decay=0.5)
    layout, head = run.initial.layouts["lora"], run.initial.layouts["head"].size
    is_b = layout.mask({"B"})
    assert run.adapter.num_trainable() == is_b.sum() + head
    for _ in range(2):
        old = run.server.shared.adapter
        each = []
        for result in run.serve().values():
            whole = old.copy()
            whole[is_b] = result.payload.adapter
            each.append(products(layout, whole))
            assert np.array_equal(run.adapter.read("lora.A"), old[~is_b])
        done = run.round()
        assert all(result.uplink_bytes == 4 * (is_b.sum() + head) for result in done.results)
        assert all(result.downlink_bytes == 4 * (layout.size + head) for result in done.results)
        for pair, target in zip(factors(layout, run.server.shared.adapter), zip(*each, strict=True), strict=True):
            product = sum(n * one for n, one in zip((9, 5, 7), target, strict=True)) / 21
            assert_svd(pair, product)
            assert np.abs(product).max() > 1e-4


@pytest.mark.parametrize(("changes", "alike"), [(SGD, True), ({}, False)])
def test_under_sgd_no_orthonormal_basis_is_better_than_another(start, changes, alike):
    """(B W, Wᵀ A) with an orthogonal W is the same model. SGD makes the same one of it again, clipped and decayed as it
    is; AdamW does not."""
    run = start("fedsvd", **changes)
    run.round()
    layout, server = run.initial.layouts["lora"], run.server
    turn = draw_frames(Layout((Slot("turn", "A", (2, 2)),)), 1).reshape(2, 2).astype(np.float64)
    turned = np.concatenate(
        [m.ravel() for a, b in factors(layout, server.shared.adapter) for m in (turn.T @ a, b @ turn)]
    ).astype(np.float32)
    both = []
    for adapter in (server.shared.adapter, turned):
        run.federation.server = replace(server, shared=replace(server.shared, adapter=adapter))
        whole = adapter.copy()
        whole[layout.mask({"B"})] = run.serve("client_000")["client_000"].payload.adapter
        both.append(np.concatenate([product.ravel() for product in products(layout, whole)]))
    before = np.concatenate([product.ravel() for product in products(layout, server.shared.adapter)])
    change = np.linalg.norm(both[0] - before)
    assert change > 1e-3
    assert (np.linalg.norm(both[0] - both[1]) < 1e-4 * change) == alike


def test_what_cannot_be_is_refused(start):
    with pytest.raises(ConfigError, match=r"fedsvd\.adapter: reft has no factors A and B.*use adapter: lora"):
        start({"name": "fedsvd", "adapter": "reft"})
    with pytest.raises(ConfigError, match=r"lora\.rank: 100, but .* has \d+ inputs.*lower lora\.rank"):
        start("fedsvd", lora__rank=100)
