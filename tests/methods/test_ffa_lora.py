"""FFA-LoRA: A is the common draw for ever, only B travels, and the mean of factors is the mean of products."""

import numpy as np
import pytest

from fedray.adapters.draws import draw_lora
from fedray.errors import ConfigError
from fedray.methods.bases.shared_adapter import GlobalAdapter
from fedray.methods.ffa_lora import FfaLora


def products(layout, a, b):
    """Every target's B A, from the vectors of A and of B."""
    left, right = layout.part("B").items(b), layout.part("A").items(a)
    return [np.asarray(y, float) @ x for (_, y), (_, x) in zip(left, right, strict=True)]


def test_the_mean_of_the_products_is_exact_in_every_round(start):
    """B̄ A_0 = Σ n_k B_k A_0 / Σ n, and only B and the head are trained and sent."""
    run = start("ffa_lora")
    layout = run.initial.layouts["lora"]
    a = run.initial.vector("lora.A")
    for _ in range(2):
        sent = [result.payload for result in run.serve().values()]
        results = run.round().results
        size = layout.part("B").size + run.initial.layouts["head"].size
        assert all(result.uplink_bytes == result.downlink_bytes == 4 * size for result in results)
        found = products(layout, a, run.server.shared.adapter)
        each = [products(layout, a, payload.adapter) for payload in sent]
        for target, mean in enumerate(found):
            expected = sum(n * one[target] for n, one in zip((9, 5, 7), each, strict=True)) / 21
            np.testing.assert_allclose(mean, expected, atol=1e-6)
            assert np.abs(mean).max() > 1e-4
    assert run.adapter.num_trainable() == size


def test_a_stays_at_its_draw_through_weight_decay(start):
    """Whatever the adapter held before: the draw is loaded in every round, and decay does not reach it."""
    run = start("ffa_lora", train__weight_decay=0.5)
    for _ in range(3):
        run.adapter.load("lora", np.ones(run.initial.layouts["lora"].size, np.float32))
        run.round()
        drawn = draw_lora(run.initial.layouts["lora"], run.config.seed)[run.initial.layouts["lora"].mask({"A"})]
        assert np.array_equal(run.adapter.read("lora.A"), drawn)
        assert np.array_equal(drawn, run.initial.vector("lora.A"))


def test_equal_updates_are_the_mean(paper, clients, spread, updates):
    method, point = FfaLora(), spread(1, 12)[0]
    server = method.init_server(paper, clients)
    assert server.layout == paper.layouts["lora"].part("B")
    after, _ = method.aggregate_train(server, updates(clients, [GlobalAdapter(point, paper.head())] * 5))
    np.testing.assert_allclose(after.shared.adapter, point, rtol=1e-6)
    assert method.aggregate_train(after, [])[0] is after


def test_a_tier_holds_the_first_columns_of_b(start):
    """Rank 1 of 2: the first column is the mean of all, the second that of the clients which hold it."""
    tiers = {"weak": {"clients": ["client_000"], "lora_rank": 1}, "rest": {"share": 1.0}}
    run = start("ffa_lora", clients__tiers=tiers)
    layout = run.server.layout
    p, q, r = (run.serve(client.id)[client.id].payload.adapter for client in run.prepared.clients)
    assert p.size == q.size // 2
    run.round()
    weak = dict(zip([slot.name for slot in layout.slots], np.split(p, len(layout.slots)), strict=True))
    for (slot, found), (_, y), (_, z) in zip(
        layout.items(run.server.shared.adapter), layout.items(q), layout.items(r), strict=True
    ):
        first = (9 * weak[slot.name] + 5 * y[:, 0] + 7 * z[:, 0]) / 21
        np.testing.assert_allclose(found[:, 0], first, atol=1e-6)
        np.testing.assert_allclose(found[:, 1], (5 * y[:, 1] + 7 * z[:, 1]) / 12, atol=1e-6)


def test_needs_a_lora(start):
    with pytest.raises(ConfigError, match=r"ffa_lora\.adapter: reft has no factors A and B.*use adapter: lora"):
        start({"name": "ffa_lora", "adapter": "reft"})
