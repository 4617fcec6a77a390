"""FedSA-LoRA: A is averaged, B and by default the head stay with the client."""

import numpy as np
import pytest

from fedray.errors import ConfigError


def test_only_a_travels_and_is_averaged(start):
    run = start("fedsa_lora")
    layout = run.initial.layouts["lora"].part("A")
    for _ in range(2):
        p, q, r = (result.payload for result in run.serve().values())
        assert p.head is None
        results = run.round().results
        assert all(result.uplink_bytes == result.downlink_bytes == 4 * layout.size for result in results)
        expected = (9 * p.adapter + 5 * q.adapter + 7 * r.adapter) / 21
        np.testing.assert_allclose(run.server.shared.adapter, expected, atol=1e-6)
    states = [run.state(client.id) for client in run.prepared.clients]
    assert len({state.private.tobytes() for state in states}) == len({state.head.tobytes() for state in states}) == 3


def test_a_shared_head_is_averaged(start):
    run = start({"name": "fedsa_lora", "head": "shared"})
    p, q, r = (result.payload.head for result in run.serve().values())
    (done,) = run.rounds(1)
    size = run.initial.layouts["lora"].part("A").size + run.initial.layouts["head"].size
    assert all(result.uplink_bytes == 4 * size for result in done.results)
    np.testing.assert_allclose(run.server.shared.head, (9 * p + 5 * q + 7 * r) / 21, atol=1e-6)
    assert run.state("client_000").head is None


def test_of_one_client_is_local_training(start):
    run, alone = (start(name, clients__count=1, data__groups=1) for name in ("fedsa_lora", "local"))
    run.rounds(2)
    alone.rounds(2)
    whole = alone.initial.layouts["lora"]
    trained = alone.state("client_000").adapter
    assert np.array_equal(run.server.shared.adapter, trained[whole.mask({"A"})])
    assert np.array_equal(run.state("client_000").private, trained[whole.mask({"B"})])
    assert np.array_equal(run.state("client_000").head, alone.state("client_000").head)


def test_absent_clients_keep_theirs_and_return_to_the_current_a(start):
    """Two of three take part in a round. Whoever is absent keeps its B and head bit for bit."""
    run = start("fedsa_lora", clients__per_round=2)
    run.round()
    for _ in range(3):
        before = run.states()
        done = run.round()
        present = {result.client.id for result in done.results}
        for id in before.keys() - present:
            assert np.array_equal(run.state(id).private, before[id].private)
            assert np.array_equal(run.state(id).head, before[id].head)
        for id in before.keys() & present:
            assert not np.array_equal(run.state(id).private, before[id].private)


def test_a_tier_holds_the_first_rows_of_a(start):
    tiers = {"weak": {"clients": ["client_000"], "lora_rank": 1}, "rest": {"share": 1.0}}
    run = start("fedsa_lora", clients__tiers=tiers)
    layout = run.server.layout
    p, q, r = (run.serve(client.id)[client.id].payload.adapter for client in run.prepared.clients)
    run.round()
    weak = np.split(p, len(layout.slots))
    for (_, found), x, (_, y), (_, z) in zip(
        layout.items(run.server.shared.adapter), weak, layout.items(q), layout.items(r), strict=True
    ):
        np.testing.assert_allclose(found[0], (9 * x + 5 * y[0] + 7 * z[0]) / 21, atol=1e-6)
        np.testing.assert_allclose(found[1], (5 * y[1] + 7 * z[1]) / 12, atol=1e-6)


def test_needs_a_lora(start):
    with pytest.raises(ConfigError, match=r"fedsa_lora\.adapter: reft has no factors A and B.*use adapter: lora"):
        start({"name": "fedsa_lora", "adapter": "reft"})
