"""FLoRA-NA: means of the factors, weighted so that their product is close to the mean product."""

from dataclasses import replace

import numpy as np
import pytest
from lora_clients import INITIAL, LAYOUT, LORA, cohort, factors, mean_head, mean_products, padded_means, sent, uploads

from fedray.errors import ConfigError
from fedray.methods.flora_na import FloraNa


def aggregated(updates, **options):
    method = FloraNa(adapter=LORA, **options)
    return method.aggregate_train(method.init_server(INITIAL, []), updates)[0].shared


def fitted(clients, mean, sweeps, w):
    """Σ p_k A_k and Σ q_k B_k by alternating dense least squares."""
    p = q = w
    for _ in range(sweeps):
        a = sum(share * a for share, (a, _) in zip(p, clients, strict=True))
        q = np.linalg.lstsq(np.stack([(b @ a).ravel() for _, b in clients], 1), mean.ravel(), rcond=None)[0]
        b = sum(share * b for share, (_, b) in zip(q, clients, strict=True))
        p = np.linalg.lstsq(np.stack([(b @ a).ravel() for a, _ in clients], 1), mean.ravel(), rcond=None)[0]
    return sum(share * a for share, (a, _) in zip(p, clients, strict=True)), b


def test_a_round_by_hand():
    updates = cohort(0, [1, 2, 5])
    shared = aggregated(updates, sweeps=3)
    found = zip(factors(LAYOUT, shared.adapter), sent(updates), mean_products(updates), strict=True)
    for (a, b), clients, mean in found:
        wanted_a, wanted_b = fitted(clients, mean, 3, np.array([1, 2, 5]) / 8)
        np.testing.assert_allclose(a, wanted_a, atol=1e-5)
        np.testing.assert_allclose(b, wanted_b, atol=1e-5)
    np.testing.assert_allclose(shared.head, mean_head(updates), atol=1e-6)


@pytest.mark.parametrize("ranks", [None, [1, 2, None]])
def test_the_error_is_between_the_best_of_rank_r_and_fedits(ranks):
    for seed in range(10):
        updates = cohort(seed, [1, 2, 5], ranks)
        found = zip(
            factors(LAYOUT, aggregated(updates).adapter), padded_means(updates), mean_products(updates), strict=True
        )
        for (a, b), (mean_a, mean_b), mean in found:
            best = np.linalg.norm(np.linalg.svd(mean, compute_uv=False)[3:])
            assert best - 1e-5 <= np.linalg.norm(b @ a - mean) <= np.linalg.norm(mean_b @ mean_a - mean) + 1e-5


def test_without_sweeps_with_one_client_or_a_common_a_it_is_exact_or_fedavg():
    (update,) = cohort(2, [4])
    others, shared_a = cohort(3, [1, 2, 3]), LAYOUT.mask({"A"})
    for (a, b), (mean_a, mean_b) in zip(
        factors(LAYOUT, aggregated(others, sweeps=0).adapter), padded_means(others), strict=True
    ):
        np.testing.assert_allclose(a, mean_a, atol=1e-6)
        np.testing.assert_allclose(b, mean_b, atol=1e-6)
    for other in others:
        other.payload.adapter[shared_a] = update.payload.adapter[shared_a]
    for updates in ([update], others, [replace(update, client=other.client) for other in others]):
        for (a, b), mean in zip(factors(LAYOUT, aggregated(updates).adapter), mean_products(updates), strict=True):
            np.testing.assert_allclose(b @ a, mean, atol=1e-5)


def test_no_update_changes_nothing():
    method = FloraNa(adapter=LORA)
    server, _ = method.aggregate_train(method.init_server(INITIAL, []), cohort(4, [1, 2]))
    assert method.aggregate_train(server, [])[0] is server


def test_two_real_rounds(start):
    """The next model's error is at most that of FedAvg from the same updates, and the head is the mean."""
    run = start("flora_na")
    layout = run.initial.layouts["lora"]
    for _ in range(2):
        updates = uploads(run)
        run.round()
        found = zip(
            factors(layout, run.server.shared.adapter),
            padded_means(updates, layout),
            mean_products(updates, layout),
            strict=True,
        )
        for (a, b), (mean_a, mean_b), mean in found:
            assert np.linalg.norm(b @ a - mean) < np.linalg.norm(mean_b @ mean_a - mean)
        np.testing.assert_allclose(run.server.shared.head, mean_head(updates), atol=1e-6)


def test_values_that_make_no_sense_are_refused(start):
    with pytest.raises(ConfigError, match="flora_na.sweeps: expected at least 0, got -1"):
        FloraNa(adapter=LORA, sweeps=-1)
    with pytest.raises(ConfigError, match="flora_na.adapter: .*which the server combines; use adapter: lora"):
        start({"name": "flora_na", "adapter": "full"})
