"""FLoRA: the exact sum of all products of all rounds, and a fresh LoRA on top of it."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from lora_clients import (
    INITIAL,
    LORA,
    cohort,
    dense,
    factors,
    mean_head,
    mean_products,
    uploads,
)
from received import received

from fedray.adapters.kinds.lora import LoraKind
from fedray.errors import ConfigError
from fedray.methods.flora import Flora
from fedray.methods.parts.factors import zero
from fedray.storage.state_tree import num_bytes

WEAK = {"weak": {"clients": ["client_000", "client_002"], "lora_rank": 1}, "strong": {"clients": ["client_001"]}}


class OtherLora(LoraKind):
    """A LoRA that is attached in another way."""


def flora(**options):
    return Flora(adapter=LORA, **{"carried_rank": 64, **options})


def test_the_sum_of_all_rounds_and_ranks():
    """C = Σ_rounds Σ_k w_k B_k A_k, clients of ranks 1, 2 and 3; columns: 6 a round, at most min(d_out, d_in)."""
    method, rounds = flora(), [cohort(seed, [1, 2, 5], [1, 2, None]) for seed in range(3)]
    server, expected = method.init_server(INITIAL, []), [0, 0]
    for updates, columns in zip(rounds, ([6, 4], [7, 4], [7, 4]), strict=True):
        server, metrics = method.aggregate_train(server, updates)
        expected = [c + more for c, more in zip(expected, mean_products(updates), strict=True)]
        for found, wanted in zip(dense(server.shared.carried), expected, strict=True):
            np.testing.assert_allclose(found, wanted, atol=5e-6)
        np.testing.assert_allclose(server.shared.head, mean_head(updates), atol=1e-6)
        assert [x.rank for x in server.shared.carried] == columns
        assert metrics["carried_error"] < 1e-6


def test_uniform_weights():
    updates = cohort(0, [1, 2, 5])
    method = flora(weights="uniform")
    server, _ = method.aggregate_train(method.init_server(INITIAL, []), updates)
    wanted = mean_products([replace(update, num_examples=1) for update in updates])
    for found, mean in zip(dense(server.shared.carried), wanted, strict=True):
        np.testing.assert_allclose(found, mean, atol=1e-6)


def test_equal_clients_add_their_one_product():
    (update,) = cohort(1, [4])
    same = [replace(update, client=replace(update.client, id=f"client_{k}")) for k in range(3)]
    method = flora()
    server, _ = method.aggregate_train(method.init_server(INITIAL, []), same)
    for found, wanted in zip(dense(server.shared.carried), mean_products([update]), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_a_small_carried_rank_loses_what_the_metric_says():
    """One client, whose product of rank 3 is cut to 2: the error is σ_3 / √Σσ², the larger of the two targets'."""
    (update,) = cohort(2, [4])
    method = flora(carried_rank=2)
    server, metrics = method.aggregate_train(method.init_server(INITIAL, []), [update])
    values = [np.linalg.svd(product, compute_uv=False) for product in mean_products([update])]
    assert metrics["carried_error"] == pytest.approx(max(s[2] / np.linalg.norm(s) for s in values), rel=1e-4)
    assert [x.rank for x in server.shared.carried] == [2, 2]


def test_no_update_changes_nothing():
    method = flora()
    server, _ = method.aggregate_train(method.init_server(INITIAL, []), cohort(3, [1, 2]))
    assert method.aggregate_train(server, [])[0] is server


def test_what_goes_down():
    """Round 0: the head alone. Then the head and the columns that there are, one object for all tiers."""
    method, updates = flora(), cohort(4, [1, 2], [1, None])
    clients = [update.client for update in updates]
    server = method.init_server(INITIAL, clients)
    assert {num_bytes(payload) for payload in received(method, server, clients).values()} == {4 * 5}
    server, _ = method.aggregate_train(server, updates)
    down = received(method, server, clients)
    assert down["client_0"] is down["client_1"]
    assert num_bytes(down["client_0"]) == 4 * (5 + 4 * (9 + 7) + 4 * (4 + 8))


@pytest.mark.parametrize("tiers", [None, WEAK])
def test_two_real_rounds(start, tiers):
    """Σ w_k B_k A_k of what the clients send, in both rounds; every client's A differs from round to round."""
    changes = {} if tiers is None else {"clients__tiers": tiers}
    run = start({"name": "flora", "carried_rank": 64}, **changes)
    layout, expected = run.initial.layouts["lora"], [0] * 4
    for _ in range(2):
        updates = uploads(run)
        done = run.round()
        for result, update in zip(done.results, updates, strict=True):
            assert result.uplink_bytes == num_bytes(update.payload)
        expected = [c + more for c, more in zip(expected, mean_products(updates, layout), strict=True)]
        for found, wanted in zip(dense(run.server.shared.carried), expected, strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-6)
        assert np.abs(expected[0]).max() > 1e-5


def test_clients_and_rounds_draw_their_own_a(start):
    """At a rate that changes nothing, what a client sends is its draw: six draws within 1/√16, all far apart."""
    run = start({"name": "flora", "carried_rank": 64}, train__lr=1e-12)
    drawn = []
    for _ in range(2):
        drawn += [factors(run.server.layout, update.payload.adapter)[0][0] for update in uploads(run)]
        run.round()
    assert max(np.abs(a).max() for a in drawn) <= 0.25
    assert min(np.abs(a - b).max() for a, b in combinations(drawn, 2)) > 0.1


def test_of_one_client_is_training_merging_and_training_anew(start):
    """Its second round equals that of a client whose base weights contain s C, trained with the same draws."""
    exact = {"clients__count": 1, "data__groups": 1, "lora__dropout": 0.0, "train__optimizer": "sgd", "train__lr": 0.5}
    run, merged = (start({"name": "flora", "carried_rank": 64}, **exact) for _ in range(2))
    run.round()
    carried = run.server.shared.carried
    for layer, c in zip(merged.adapter.targets.values(), dense(carried), strict=True):
        base = layer.get_base_layer()
        change = torch.from_numpy((8.0 / 2 * c).astype(np.float32))
        base.weight = torch.nn.Parameter(base.weight + change, requires_grad=False)
    shared = run.server.shared
    merged.federation.restore(1, replace(run.server, shared=replace(shared, carried=zero(run.server.layout))), {})
    (found,), (wanted,) = uploads(run), uploads(merged)
    assert np.abs(wanted.payload.head - shared.head).max() > 1e-2
    np.testing.assert_allclose(found.payload.adapter, wanted.payload.adapter, atol=1e-5)
    np.testing.assert_allclose(found.payload.head, wanted.payload.head, atol=1e-5)


def test_values_that_make_no_sense_are_refused(start):
    with pytest.raises(ConfigError, match="flora.carried_rank: expected at least 1, got 0"):
        flora(carried_rank=0)
    with pytest.raises(ConfigError, match="flora.adapter: .*reft.* whose products are carried along; use"):
        start({"name": "flora", "carried_rank": 4, "adapter": "reft"})
    with pytest.raises(ConfigError, match="flora.adapter: .*OtherLora.* has no branch for the carried sum"):
        Flora(adapter=OtherLora(), carried_rank=4)
    with pytest.raises(ConfigError, match="carried_rank: missing"):
        start("flora")
