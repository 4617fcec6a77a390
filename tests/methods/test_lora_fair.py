"""LoRA-FAIR: FedAvg's Ā and the B that makes up best for what it misses."""

from dataclasses import replace

import numpy as np
import pytest
from lora_clients import INITIAL, LAYOUT, LORA, cohort, factors, mean_head, mean_products, padded_means, uploads

from fedray.errors import ConfigError
from fedray.methods.lora_fair import LoraFair


def aggregated(updates, **options):
    method = LoraFair(adapter=LORA, **options)
    return method.aggregate_train(method.init_server(INITIAL, []), updates)[0].shared


def closed_form(mean, a, b, penalty):
    """(Δ̄ Āᵀ + μ B̄)(Ā Āᵀ + μ I)⁻¹ with μ = λ tr(Ā Āᵀ) / r."""
    mu = penalty * np.trace(a @ a.T) / len(a)
    return (mean @ a.T + mu * b) @ np.linalg.inv(a @ a.T + mu * np.eye(len(a)))


@pytest.mark.parametrize("ranks", [None, [1, 2, None]])
@pytest.mark.parametrize("penalty", [0.01, 1.0])
def test_a_round_by_hand(ranks, penalty):
    updates = cohort(0, [1, 2, 5], ranks)
    shared = aggregated(updates, penalty=penalty)
    found = zip(factors(LAYOUT, shared.adapter), padded_means(updates), mean_products(updates), strict=True)
    for (a, b), (mean_a, mean_b), mean in found:
        np.testing.assert_allclose(a, mean_a, atol=1e-6)
        np.testing.assert_allclose(b, closed_form(mean, mean_a, mean_b, penalty), rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(shared.head, mean_head(updates), atol=1e-6)


def test_without_limit_it_is_fedavg_and_without_penalty_the_rest_is_orthogonal():
    """λ = 0: (B Ā − Δ̄) Āᵀ = 0."""
    updates = cohort(1, [1, 2, 5])
    for (_, b), (_, mean_b) in zip(
        factors(LAYOUT, aggregated(updates, penalty=1e9).adapter), padded_means(updates), strict=True
    ):
        np.testing.assert_allclose(b, mean_b, atol=1e-6)
    free = factors(LAYOUT, aggregated(updates, penalty=0.0).adapter)
    for (a, b), mean in zip(free, mean_products(updates), strict=True):
        assert np.abs((b @ a - mean) @ a.T).max() < 2e-5


def test_one_client_a_common_a_and_equal_clients_are_fedavg():
    (update,) = cohort(2, [4])
    others, shared_a = cohort(3, [1, 2, 3]), LAYOUT.mask({"A"})
    for other in others:
        other.payload.adapter[shared_a] = update.payload.adapter[shared_a]
    for updates in ([update], others, [replace(update, client=other.client) for other in others]):
        found = factors(LAYOUT, aggregated(updates).adapter)
        for (a, b), (mean_a, mean_b) in zip(found, padded_means(updates), strict=True):
            np.testing.assert_allclose(a, mean_a, atol=1e-6)
            np.testing.assert_allclose(b, mean_b, atol=1e-6)


def test_no_update_changes_nothing():
    method = LoraFair(adapter=LORA)
    server, _ = method.aggregate_train(method.init_server(INITIAL, []), cohort(4, [1, 2]))
    assert method.aggregate_train(server, [])[0] is server


def test_two_real_rounds_of_two_of_three_clients(start):
    run = start("lora_fair", clients__per_round=2)
    layout = run.initial.layouts["lora"]
    for _ in range(2):
        served = {update.client.id: update for update in uploads(run)}
        updates = [served[result.client.id] for result in run.round().results]
        assert len(updates) == 2
        found = zip(
            factors(layout, run.server.shared.adapter),
            padded_means(updates, layout),
            mean_products(updates, layout),
            strict=True,
        )
        for (a, b), (mean_a, mean_b), mean in found:
            np.testing.assert_allclose(a, mean_a, atol=1e-6)
            np.testing.assert_allclose(b, closed_form(mean, mean_a, mean_b, 0.01), atol=1e-6)


@pytest.mark.parametrize("penalty", [-0.1, float("inf"), float("nan")])
def test_penalties_that_make_no_sense_are_refused(penalty):
    with pytest.raises(ConfigError, match="lora_fair.penalty: expected a number of at least 0, got"):
        LoraFair(adapter=LORA, penalty=penalty)
