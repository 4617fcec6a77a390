"""Cohorts of weak clients under methods that fill factors up with zeros: a component that no client of the cohort holds
must not be zero in both factors afterwards, since its gradient would be zero for ever."""

from dataclasses import replace

import numpy as np
import pytest
from lora_clients import INITIAL, LAYOUT, LORA, cohort, factors, padded_means
from received import received

from fedray.methods.fedex_lora import FedExLora
from fedray.methods.flora_na import FloraNa
from fedray.methods.hetlora import HetLora, Pruned
from fedray.methods.lora_fair import LoraFair
from fedray.methods.parts.capacity import own_layout

METHODS = {
    "fedex_lora": FedExLora(adapter=LORA, carried_rank=64),
    "flora_na": FloraNa(adapter=LORA),
    "hetlora": HetLora(adapter=LORA),
    "lora_fair": LoraFair(adapter=LORA),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_what_nobody_holds_keeps_its_a_and_adds_nothing(method):
    """Two clients of rank 1 after a round of all ranks. Components 1 and 2 of the common model keep their A, and B = 0
    is what zero-padding says of them."""
    server = method.init_server(INITIAL, [])
    for seed, ranks in ((0, [1, 2, None]), (1, [1, 1])):
        before, updates = server.shared.adapter, cohort(seed, [1, 2, 5][: len(ranks)], ranks)
        if isinstance(method, HetLora):
            updates = [
                replace(
                    u, payload=Pruned(u.payload.adapter, u.payload.head, active_rank=u.capacity.get("lora_rank", 3))
                )
                for u in updates
            ]
        server, _ = method.aggregate_train(server, updates)
    found = zip(factors(LAYOUT, server.shared.adapter), factors(LAYOUT, before), padded_means(updates), strict=True)
    for (a, b), (old_a, _), (mean_a, _) in found:
        assert not mean_a[1:].any()
        assert np.array_equal(a[1:], old_a[1:])
        assert old_a[1:].all()
        assert not b[:, 1:].any()
        assert b[:, 0].any()


@pytest.mark.parametrize("name", METHODS)
def test_a_strong_client_trains_all_components_after_a_round_of_weak_ones(start, name):
    tiers = {"weak": {"clients": ["client_000", "client_002"], "lora_rank": 1}, "strong": {"clients": ["client_001"]}}
    options = {"carried_rank": 64} if name == "fedex_lora" else {}
    run = start({"name": name, **options}, clients__tiers=tiers)
    run.federation.clients = tuple(client for client in run.prepared.clients if client.tier == "weak")
    run.round()
    (strong,) = (client for client in run.prepared.clients if client.tier == "strong")
    assert own_layout(run.server.layout, strong.capacity) == run.server.layout
    down = received(run.method, run.server, run.prepared.clients)[strong.id]
    up = run.serve(strong.id)[strong.id].payload
    for (_, b), (_, trained) in zip(
        factors(run.server.layout, down.adapter), factors(run.server.layout, up.adapter), strict=True
    ):
        assert (trained != b).all(axis=0).tolist() == [True, True]
