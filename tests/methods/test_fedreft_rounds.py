"""FedReFT in whole rounds of a tiny model: what travels, and that rotations stay rotations."""

import numpy as np
import pytest
from received import received
from scipy.linalg import polar


@pytest.mark.parametrize("share", ["full", "rotation", "source"])
def test_what_travels(start, share):
    """Two layers, prefix and suffix, R and W of [2, 16], b of [2]: 264 numbers, 128 of them R, 136 W and b. Nothing
    comes down before anybody has trained."""
    run = start({"name": "fedreft", "share": share, "mixing": "fixed"}, head="local", train__max_steps=1)
    shared = {"full": 264, "rotation": 128, "source": 136}[share]
    for server_round in range(2):
        for result in run.round().results:
            assert result.uplink_bytes == 4 * shared
            assert result.downlink_bytes == (4 * shared if server_round else 0)
            assert run.state(result.client.id).phi.size == 264


def rotations(run, phi):
    return [view for slot, view in run.initial.layouts["reft"].items(phi) if slot.part == "R"]


def assert_orthonormal(matrices):
    for r in matrices:
        np.testing.assert_allclose(r @ r.T, np.eye(len(r)), atol=1e-5)


def test_rotations_stay_orthonormal_under_weight_decay_and_mixing(start):
    """Weight decay on the raw tensor of the parametrization turns R into zeros at once; four rounds with it configured,
    mixing adaptively, and every R of every client and of every uplink is orthonormal to 1e-5, and has moved."""
    run = start(
        {"name": "fedreft", "candidates": (0.25, 0.5, 1.0)}, clients__count=4, train__weight_decay=0.1, train__lr=0.05
    )
    first = rotations(run, run.initial.vectors["reft"])
    assert_orthonormal(first)
    for server_round in range(4):
        done = run.round()
        for result in done.results:
            client = result.client.id
            assert (result.report.recorded["lam"] > 0) == (server_round > 0)
            for phi in (result.payload.phi, run.state(client).phi):
                assert_orthonormal(rotations(run, phi))
                assert max(np.abs(r - r0).max() for r, r0 in zip(rotations(run, phi), first, strict=True)) > 1e-3


def test_the_mixture_is_retracted_when_it_is_loaded(start, fake_local):
    """R of (φ_k + φ_{-k})/2 is not orthonormal; training starts from its polar factor (by scipy), and from the plain
    means of W and b."""
    run = start({"name": "fedreft", "mixing": "fixed", "lam": 0.5, "aggregate": "mean"}, train__lr=0.1)
    run.round()
    adapter, client, seen = run.worker.adapter, run.prepared.clients[0], []
    down = received(run.method, run.federation.server, [client])[client.id]
    own = run.state(client.id)
    run.method.train_client(adapter, own, down, fake_local(client, adapter, lambda a: seen.append(a.read("reft"))))
    others = np.mean([run.state(id).phi for id in ("client_001", "client_002")], axis=0)
    mixed = run.initial.layouts["reft"].items((own.phi + others) / 2)
    for (slot, loaded), (_, plain) in zip(run.initial.layouts["reft"].items(seen[0]), mixed, strict=True):
        np.testing.assert_allclose(loaded, polar(plain)[0] if slot.part == "R" else plain, atol=1e-5)
    assert any(np.abs(view @ view.T - np.eye(2)).max() > 1e-3 for slot, view in mixed if slot.part == "R")


def test_a_lambda_of_zero_is_local_training(start):
    """λ = 0 with private heads: every client ends where it ends without any federation, bit for bit."""
    alone = start({"name": "local", "adapter": "reft"}, head="local")
    run = start({"name": "fedreft", "mixing": "fixed", "lam": 0.0}, head="local")
    alone.rounds(3)
    run.rounds(3)
    for client in run.prepared.clients:
        assert np.array_equal(run.state(client.id).phi, alone.state(client.id).adapter)
        assert np.array_equal(run.state(client.id).head, alone.state(client.id).head)


def test_a_frozen_head_never_moves_and_never_travels(start):
    run = start({"name": "fedreft", "mixing": "fixed"}, head="frozen_label_text")
    adapter = run.worker.adapter
    for done in run.rounds(2):
        assert all(result.payload.head is None for result in done.results)
        assert all(result.uplink_bytes == 4 * 264 for result in done.results)
        assert np.array_equal(adapter.read("head"), run.initial.head())
    assert run.initial.head().any()
    assert run.federation.server.head is run.state("client_000").head is None
