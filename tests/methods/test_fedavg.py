"""FedAvg: the weighted mean by hand, on LoRA and on LoReFT, whose averaged rotations must be rotations again."""

from dataclasses import replace

import numpy as np
import pytest
from received import received
from scipy.linalg import polar

from fedray.adapters.kinds.lora import LoraKind
from fedray.adapters.kinds.reft import ReftKind
from fedray.config import LoraSection, ReftSection
from fedray.methods.bases.shared_adapter import ClientState, GlobalAdapter
from fedray.methods.fedavg import FedAvg
from fedray.methods.protocol import Update


def fedavg(**options):
    return FedAvg(adapter=LoraKind(lora=LoraSection(rank=2)), **options)


def test_weights_are_the_numbers_of_examples(paper, clients, spread, updates):
    """a to e have 1 to 5 examples: Σ k p_k / 15, adapter and head alike. What the server held before does not count."""
    method, points, heads = fedavg(), spread(5, 28), spread(5, 3)
    payloads = [GlobalAdapter(point, head) for point, head in zip(points, heads, strict=True)]
    server, _ = method.aggregate_train(method.init_server(paper, clients), updates(clients, payloads))
    for found, sent in ((server.shared.adapter, points), (server.shared.head, heads)):
        expected = (1 * sent[0] + 2 * sent[1] + 3 * sent[2] + 4 * sent[3] + 5 * sent[4]) / 15
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_uniform_weights(paper, clients, spread, updates):
    method, points, heads = fedavg(weights="uniform"), spread(5, 28), spread(5, 3)
    payloads = [GlobalAdapter(point, head) for point, head in zip(points, heads, strict=True)]
    server, _ = method.aggregate_train(method.init_server(paper, clients), updates(clients, payloads))
    np.testing.assert_allclose(server.shared.adapter, points.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(server.shared.head, heads.mean(axis=0), atol=1e-6)


def test_absent_clients_do_not_count(paper, clients, spread, updates):
    """All five train, then b (2 examples) and e (5) alone: (2 p_b + 5 p_e)/7. Where nobody comes, nothing changes."""
    method, points = fedavg(head="local"), spread(7, 28)
    payloads = [GlobalAdapter(point, None) for point in points]
    server, _ = method.aggregate_train(method.init_server(paper, clients), updates(clients, payloads[:5]))
    server, _ = method.aggregate_train(server, updates([clients[1], clients[4]], payloads[5:]))
    np.testing.assert_allclose(server.shared.adapter, (2 * points[5] + 5 * points[6]) / 7, atol=1e-6)
    assert method.aggregate_train(server, [])[0] is server


def test_averaged_rotations_are_retracted(paper, clients, updates):
    """Two clients of 1 and 2 examples, R and J R with J a rotation by 90 degrees, W and b of opposite signs.

    (1 + 2 J)ᵀ(1 + 2 J) = 5, so the mean (1 + 2 J)/3 R has the polar factor (1 + 2 J)/√5 R; W and b have the plain mean
    (w − 2 w)/3 = −w/3.
    """
    layout = paper.layouts["reft"]
    one, two = paper.vectors["reft"].copy(), paper.vectors["reft"].copy()
    j = np.array([[0.0, -1.0], [1.0, 0.0]])
    expected = -one / 3
    places = zip(layout.items(one), layout.items(two), layout.items(expected), strict=True)
    for (slot, a), (_, b), (_, mean) in places:
        if slot.part == "R":
            a[...] = polar(a)[0]
            b[...] = j @ a
            mean[...] = (np.eye(2) + 2 * j) / np.sqrt(5) @ a
        else:
            b[...] = -a
    method = replace(fedavg(head="local"), adapter=ReftKind(reft=ReftSection(rank=2)))
    payloads = [GlobalAdapter(one, None), GlobalAdapter(two, None)]
    server, _ = method.aggregate_train(method.init_server(paper, clients), updates(clients[:2], payloads))
    np.testing.assert_allclose(server.shared.adapter, expected, atol=1e-6)


def test_all_receive_one_object_and_start_from_it(paper, clients, vector_adapter, fake_local, spread):
    """One object, so that it is sent once per node. What the client did in its last round is overwritten."""
    method = fedavg()
    down = received(method, method.init_server(paper, clients), clients)
    assert len({id(payload) for payload in down.values()}) == 1
    adapter, seen = vector_adapter(paper), {}
    adapter.load("lora", spread(1, 28)[0])
    adapter.load("head", spread(1, 3)[0])
    local = fake_local(clients[0], adapter, lambda a: seen.update({name: a.read(name) for name in ("lora", "head")}))
    sent, own = method.train_client(adapter, ClientState(None), down["a"], local)
    for group in ("lora", "head"):
        assert np.array_equal(seen[group], paper.vectors[group])
    assert np.array_equal(sent.adapter, paper.vectors["lora"])
    assert own.head is None


@pytest.mark.parametrize("adapter", ["lora", "reft"])
def test_two_real_rounds(start, adapter):
    """9, 5 and 7 examples; the server's next adapter from the uplinks by hand, and the next downlink is it."""
    run = start({"name": "fedavg", "adapter": adapter})
    layout = run.initial.layouts[adapter]
    size = layout.size + run.initial.layouts["head"].size
    for _ in range(2):
        before = run.federation.server.shared
        p, q, r = (result.payload for result in run.serve().values())
        results = run.round().results
        assert [result.num_examples for result in results] == [9, 5, 7]
        assert all(result.uplink_bytes == result.downlink_bytes == 4 * size for result in results)
        assert not np.array_equal(p.adapter, before.adapter)
        mean = (9 * p.adapter + 5 * q.adapter + 7 * r.adapter) / 21
        for (slot, found), (_, plain) in zip(
            layout.items(run.federation.server.shared.adapter), layout.items(mean), strict=True
        ):
            np.testing.assert_allclose(found, polar(plain)[0] if slot.part == "R" else plain, atol=1e-5)
        np.testing.assert_allclose(
            run.federation.server.shared.head, (9 * p.head + 5 * q.head + 7 * r.head) / 21, atol=1e-6
        )


def test_of_one_client_is_local_training(start):
    """With one client the mean is its own: bit for bit what it would be without a server."""
    run, alone = (start(name, clients__count=1, data__groups=1, lora__dropout=0.2) for name in ("fedavg", "local"))
    run.rounds(2)
    alone.rounds(2)
    assert np.array_equal(run.federation.server.shared.adapter, alone.state("client_000").adapter)
    assert np.array_equal(run.federation.server.shared.head, alone.state("client_000").head)


@pytest.mark.parametrize("head", ["local", "frozen_label_text", "frozen_random"])
def test_a_head_that_is_not_shared_never_travels(start, head):
    run = start("fedavg", head=head)
    for _ in range(2):
        served = run.serve()
        for result in run.round().results:
            assert served[result.client.id].payload.head is None
            assert result.uplink_bytes == result.downlink_bytes == 4 * run.initial.layouts["lora"].size
    assert run.federation.server.shared.head is None
    heads = [run.state(client.id).head for client in run.prepared.clients]
    if head.startswith("frozen"):
        assert heads == [None] * 3
        assert np.array_equal(run.worker.adapter.read("head"), run.initial.head())
    else:
        assert len({vector.tobytes() for vector in [*heads, run.initial.head()]}) == 4


def test_full_fine_tuning_averages_the_whole_model(start):
    """Weighted by examples; the next round starts from there, and the file that other processes map keeps its bits."""
    run = start({"name": "fedavg", "adapter": "full"})
    before = run.initial.vectors["full"]
    results = list(run.serve().values())
    run.round()
    sent = np.stack([result.payload.adapter for result in results]).astype(np.float64)
    sizes = np.array([result.num_examples for result in results])
    expected = (sizes[:, None] * sent).sum(0) / sizes.sum()
    np.testing.assert_allclose(run.federation.server.shared.adapter, expected, atol=1e-6)
    assert np.abs(expected - before).max() > 1e-3
    again = start({"name": "fedavg", "adapter": "full"})
    assert np.array_equal(again.initial.vectors["full"], before)
    run.round()


@pytest.mark.parametrize("name", ["fedavg", "ffa_lora", "fedsa_lora"])
def test_two_rounds_with_a_server_optimizer(start, name):
    """FedAdam by hand on what was sent, adapter and head alike; m and v go on into the second round."""
    run = start({"name": name, "head": "shared", "server_optimizer": {"name": "adam", "lr": 0.05, "tau": 0.01}})
    moments = {"adapter": (0, 1e-4), "head": (0, 1e-4)}
    for _ in range(2):
        before = run.server.shared
        payloads = [result.payload for result in run.serve().values()]
        run.round()
        for part, (m, v) in moments.items():
            theta = getattr(before, part).astype(float)
            p, q, r = (getattr(payload, part).astype(float) for payload in payloads)
            mean = (9 * p + 5 * q + 7 * r) / 21
            m = 0.9 * m + 0.1 * (mean - theta)
            v = 0.99 * v + 0.01 * (mean - theta) ** 2
            moments[part] = m, v
            expected = theta + 0.05 * m / (np.sqrt(v) + 0.01)
            np.testing.assert_allclose(getattr(run.server.shared, part), expected, atol=1e-6)


def test_a_server_optimizer_moves_rotations_along_the_manifold(start):
    run = start({"name": "fedavg", "adapter": "reft", "server_optimizer": {"name": "momentum", "lr": 0.5}})
    run.rounds(2)
    for slot, value in run.server.layout.items(run.server.shared.adapter):
        if slot.part == "R":
            np.testing.assert_allclose(value @ value.T, np.eye(len(value)), atol=1e-5)


def test_components_that_nobody_held_keep_their_moments(start):
    """Only clients of rank 1 take part: the second component and its m and v stay."""
    tiers = {"weak": {"clients": ["client_000", "client_001", "client_002"], "lora_rank": 1}, "rest": {"share": 1.0}}
    run = start(
        {"name": "fedavg", "server_optimizer": {"name": "yogi", "lr": 0.05}}, clients__tiers=tiers, clients__count=4
    )
    layout, before = run.server.layout, run.server
    updates = [update for update in run.serve().values() if update.client.tier == "weak"]
    uplinks = [Update(result.client, result.client.num_examples, result.payload) for result in updates]
    after, _ = run.method.aggregate_train(before, uplinks)
    for vectors in (
        (before.shared.adapter, after.shared.adapter),
        *((before.adapter_optimizer[part], after.adapter_optimizer[part]) for part in ("m", "v")),
    ):
        for (slot, old), (_, new) in zip(*(layout.items(vector) for vector in vectors), strict=True):
            first, second = (0, 1) if slot.part == "A" else (np.s_[:, 0], np.s_[:, 1])
            assert np.array_equal(old[second], new[second])
            assert not np.array_equal(old[first], new[first])


def test_learning_rates_fall_over_the_rounds(start):
    """Four rounds, linear: the full rate, then 3/4, 2/4, 1/4 of it; the final pass has the last round's. With plain SGD
    and one step, updates have these shares of those with a constant rate from the same server state."""
    exact = {"optimizer": "sgd", "weight_decay": 0, "schedule": "constant", "clip": None, "max_steps": 1}
    exact = {f"train__{name}": value for name, value in exact.items()}
    constant, falling = (start("fedavg", **exact, train__round_schedule=shape) for shape in ("constant", "linear"))
    for share in (1, 0.75, 0.5, 0.25, 0.25):
        constant.federation.restore(
            falling.federation.server_round, falling.server, dict(constant.federation.client_states)
        )
        whole, ours = constant.serve(), falling.serve()
        for id, result in whole.items():
            before = falling.server.shared.adapter
            moved, expected = ours[id].payload.adapter - before, result.payload.adapter - before
            assert np.abs(expected).max() > 1e-4
            np.testing.assert_allclose(moved, share * expected, atol=1e-6)
        if falling.federation.server_round < 4:
            falling.round()
