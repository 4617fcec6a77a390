"""FedEx-LoRA: FedAvg's factors, and a carried sum that makes their product the exact mean."""

from dataclasses import replace

import numpy as np
import pytest
from lora_clients import (
    INITIAL,
    LAYOUT,
    LORA,
    cohort,
    dense,
    factors,
    mean_head,
    mean_products,
    padded_means,
    products,
    uploads,
)
from received import received

from fedray.methods.fedex_lora import FedExLora
from fedray.storage.state_tree import num_bytes


def fedex(**options):
    return FedExLora(adapter=LORA, **{"carried_rank": 64, **options})


@pytest.mark.parametrize("ranks", [None, [1, 2, None]])
def test_factors_are_fedavgs_and_the_sum_is_what_they_miss(ranks):
    """Two rounds: C = Σ_rounds (Δ̄ − B̄Ā), so that B̄Ā + C − (C before) = Δ̄; ranks are filled up with zeros."""
    method = fedex()
    server, missed = method.init_server(INITIAL, []), [0, 0]
    for seed, columns in ((0, [6, 4]), (1, [7, 4])):
        updates = cohort(seed, [1, 2, 5], ranks)
        server, metrics = method.aggregate_train(server, updates)
        means = padded_means(updates)
        missed = [c + mean - b @ a for c, mean, (a, b) in zip(missed, mean_products(updates), means, strict=True)]
        for (a, b), (mean_a, mean_b) in zip(factors(LAYOUT, server.shared.adapter), means, strict=True):
            np.testing.assert_allclose(a, mean_a, atol=1e-6)
            np.testing.assert_allclose(b, mean_b, atol=1e-6)
        for found, wanted in zip(dense(server.shared.carried), missed, strict=True):
            np.testing.assert_allclose(found, wanted, atol=5e-6)
        np.testing.assert_allclose(server.shared.head, mean_head(updates), atol=1e-6)
        assert [x.rank for x in server.shared.carried] == columns, "(K - 1) r = 6 columns a round"
        assert metrics["carried_error"] < 1e-6


def test_the_residuals_rank_is_at_most_its_columns():
    """9 x 7 with three clients of rank 3: (K − 1) r = 6, while a sum of three products has rank 7."""
    updates = cohort(2, [1, 2, 5])
    method = fedex()
    server, _ = method.aggregate_train(method.init_server(INITIAL, []), updates)
    assert np.linalg.matrix_rank(dense(server.shared.carried)[0], tol=1e-4) == 6
    assert np.linalg.matrix_rank(mean_products(updates)[0], tol=1e-4) == 7


def test_one_client_or_a_common_a_is_fedavg():
    """K = 1 adds no column; clients with one A, or equal ones, add columns of zeros."""
    method = fedex()
    (update,) = cohort(3, [4])
    server, _ = method.aggregate_train(method.init_server(INITIAL, []), [update])
    assert np.array_equal(server.shared.adapter, update.payload.adapter)
    assert [x.rank for x in server.shared.carried] == [0, 0]
    others = cohort(4, [1, 2, 3])
    shared_a = LAYOUT.mask({"A"})
    for other in others:
        other.payload.adapter[shared_a] = update.payload.adapter[shared_a]
    for updates in (others, [replace(update, client=other.client) for other in others]):
        server, _ = method.aggregate_train(method.init_server(INITIAL, []), updates)
        assert not any(c.any() for c in dense(server.shared.carried))
        for found, wanted in zip(products(LAYOUT, server.shared.adapter), mean_products(updates), strict=True):
            np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_no_update_changes_nothing():
    method = fedex()
    server, _ = method.aggregate_train(method.init_server(INITIAL, []), cohort(5, [1, 2]))
    assert method.aggregate_train(server, [])[0] is server


def test_a_weak_tier_receives_its_leading_components_and_the_whole_sum():
    method, updates = fedex(), cohort(6, [1, 2], [1, None])
    clients = [update.client for update in updates]
    server, _ = method.aggregate_train(method.init_server(INITIAL, clients), updates)
    down = received(method, server, clients)
    assert num_bytes(down["client_1"]) - num_bytes(down["client_0"]) == 4 * 2 * (9 + 7 + 4 + 8)
    assert down["client_0"].carried is down["client_1"].carried
    for (a, b), (whole_a, whole_b) in zip(
        factors(LAYOUT, down["client_1"].adapter), padded_means(updates), strict=True
    ):
        np.testing.assert_allclose(b @ a, whole_b @ whole_a, atol=1e-6)


def test_two_real_rounds(start):
    """In each round the next model B̄Ā + C is the mean model Σ w_k (B_k A_k + C): nothing is missed."""
    run = start({"name": "fedex_lora", "carried_rank": 64})
    layout = run.initial.layouts["lora"]
    for _ in range(2):
        updates, before = uploads(run), dense(run.server.shared.carried)
        run.round()
        shared = run.server.shared
        for product, c, old, mean in zip(
            products(layout, shared.adapter), dense(shared.carried), before, mean_products(updates, layout), strict=True
        ):
            np.testing.assert_allclose(product + c, mean + old, atol=1e-6)
        np.testing.assert_allclose(shared.head, mean_head(updates), atol=1e-6)
    assert max(np.abs(c).max() for c in dense(run.server.shared.carried)) > 1e-6


def test_of_one_client_is_local_training(start):
    one = {"clients__count": 1, "data__groups": 1}
    run, alone = start({"name": "fedex_lora", "carried_rank": 64}, **one), start("local", **one)
    run.rounds(2)
    alone.rounds(2)
    assert np.array_equal(run.server.shared.adapter, alone.state("client_000").adapter)
