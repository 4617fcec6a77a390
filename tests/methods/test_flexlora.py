"""FlexLoRA: the mean product's best approximation, whose first components are each tier's."""

from dataclasses import replace

import numpy as np
import pytest
from lora_clients import (
    INITIAL,
    LAYOUT,
    LORA,
    cohort,
    factors,
    mean_head,
    mean_products,
    padded_means,
    products,
    uploads,
)
from received import received

from fedray.errors import ConfigError
from fedray.methods.flexlora import FlexLora
from fedray.methods.parts.capacity import own_layout


def flexlora():
    return FlexLora(adapter=LORA)


def best(matrix, rank):
    u, s, vt = np.linalg.svd(matrix)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def aggregated(updates):
    method = flexlora()
    return method.aggregate_train(method.init_server(INITIAL, []), updates)[0]


def test_the_factors_are_those_of_the_released_code():
    """A has orthonormal rows, and the norms of B's columns are the singular values of the mean product."""
    updates = cohort(5, [1, 2, 5])
    for (a, b), mean in zip(factors(LAYOUT, aggregated(updates).shared.adapter), mean_products(updates), strict=True):
        np.testing.assert_allclose(a @ a.T, np.eye(len(a)), atol=2e-6)
        expected = np.linalg.svd(mean, compute_uv=False)[: len(a)]
        np.testing.assert_allclose(np.linalg.norm(b, axis=0), expected, rtol=1e-5)


@pytest.mark.parametrize("ranks", [None, [1, 2, None]])
def test_a_tier_receives_the_best_approximation_of_its_rank(ranks):
    """A dense SVD of Σ w_k B_k A_k, cut to ranks 1, 2 and 3."""
    updates = cohort(0, [1, 2, 5], ranks)
    server = aggregated(updates)
    clients = [replace(updates[0].client, id=str(rank), capacity={"lora_rank": rank}) for rank in (1, 2, 3)]
    down = received(flexlora(), server, clients)
    for rank in (1, 2, 3):
        layout = own_layout(LAYOUT, {"lora_rank": rank})
        for found, mean in zip(products(layout, down[str(rank)].adapter), mean_products(updates), strict=True):
            np.testing.assert_allclose(found, best(mean, rank), atol=2e-6)
    np.testing.assert_allclose(server.shared.head, mean_head(updates), atol=1e-6)


def test_nothing_is_lost_where_the_ranks_sum_up_to_the_common_one():
    """r = 3 >= Σ r_k = 1 + 2."""
    updates = cohort(1, [3, 4], [1, 2])
    for found, mean in zip(products(LAYOUT, aggregated(updates).shared.adapter), mean_products(updates), strict=True):
        np.testing.assert_allclose(found, mean, atol=2e-6)


def test_the_error_is_never_above_fedits():
    for seed in range(20):
        updates = cohort(seed, [1, 2, 5, 1])
        found = products(LAYOUT, aggregated(updates).shared.adapter)
        for product, mean, (a, b) in zip(found, mean_products(updates), padded_means(updates), strict=True):
            assert np.linalg.norm(product - mean) <= np.linalg.norm(b @ a - mean) + 1e-5


def test_one_client_or_equal_ones_get_their_product_back():
    (update,) = cohort(2, [4])
    for updates in ([update], [replace(update, client=replace(update.client, id=id)) for id in "abc"]):
        found = products(LAYOUT, aggregated(updates).shared.adapter)
        for product, mean in zip(found, mean_products([update]), strict=True):
            np.testing.assert_allclose(product, mean, atol=2e-6)


def test_components_without_a_singular_value_are_alive():
    """One client of rank 1 leaves two components: B = 0 as at the start, A drawn and not zero."""
    server = aggregated(cohort(3, [4], [1]))
    for a, b in factors(LAYOUT, server.shared.adapter):
        assert np.linalg.norm(b, axis=0)[0] > 0
        assert not b[:, 1:].any()
        assert (np.linalg.norm(a, axis=1) > 0.1).all()


def test_no_update_changes_nothing():
    server = aggregated(cohort(4, [1, 2]))
    assert flexlora().aggregate_train(server, [])[0] is server


def test_two_real_rounds_of_tiers(start):
    """Ranks 1, 2 and 1. Absent clients do not count, and what a client receives is the best of its rank."""
    tiers = {"weak": {"clients": ["client_000", "client_002"], "lora_rank": 1}, "strong": {"clients": ["client_001"]}}
    run = start("flexlora", clients__tiers=tiers)
    layout = run.initial.layouts["lora"]
    for _ in range(2):
        updates = uploads(run)
        run.round()
        for found, mean in zip(
            products(layout, run.server.shared.adapter), mean_products(updates, layout), strict=True
        ):
            np.testing.assert_allclose(found, best(mean, 2), atol=1e-6)
        np.testing.assert_allclose(run.server.shared.head, mean_head(updates), atol=1e-6)
    run = start("flexlora", clients__tiers=tiers, clients__per_round=2)
    updates = {update.client.id: update for update in uploads(run)}
    present = [updates[result.client.id] for result in run.round().results]
    for found, mean in zip(products(layout, run.server.shared.adapter), mean_products(present, layout), strict=True):
        np.testing.assert_allclose(found, best(mean, 2), atol=1e-6)


def test_an_adapter_without_factors_is_refused(start):
    with pytest.raises(ConfigError, match="flexlora.adapter: .*whose products FlexLoRA averages; use adapter: lora"):
        start({"name": "flexlora", "adapter": "reft"})
