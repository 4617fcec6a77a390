"""FedProx: FedAvg where its term is zero, and nearer to the server's values where it is not."""

import numpy as np
import pytest

from fedray.errors import ConfigError
from fedray.methods.bases.shared_adapter import GlobalAdapter
from fedray.methods.fedprox import FedProx
from fedray.training.steering import Proximal

EXACT = {
    "train__optimizer": "sgd",
    "train__lr": 0.1,
    "train__weight_decay": 0,
    "train__schedule": "constant",
    "train__clip": None,
    "train__epochs": 9,
    "lora__dropout": 0.0,
}


def prox(mu, **changes):
    return {"name": "fedprox", "mu": mu, **changes}


def vector(values):
    return np.concatenate([values.adapter, values.head])


def test_without_its_term_it_is_fedavg(start):
    plain, steered, other = start("fedavg"), start(prox(0)), start(prox(1.0))
    for run in (plain, steered, other):
        run.rounds(2)
    assert np.array_equal(vector(steered.server.shared), vector(plain.server.shared))
    assert not np.array_equal(vector(other.server.shared), vector(plain.server.shared))


def test_one_local_step_is_fedavgs_whatever_mu(start):
    """θ is still θ^t where its only gradient is taken."""
    plain, steered = start("fedavg", train__max_steps=1), start(prox(100.0), train__max_steps=1)
    plain.rounds(2)
    steered.rounds(2)
    assert np.array_equal(vector(steered.server.shared), vector(plain.server.shared))


def test_two_steps_by_hand(start):
    """SGD: θ_2 = θ_1 − η (g(θ_1) + μ (θ_1 − θ_0)), of which FedAvg has the first two terms and the same θ_1."""
    one, two, steered = (
        start(method, **{**EXACT, "train__max_steps": steps})
        for method, steps in (("fedavg", 1), ("fedavg", 2), (prox(0.5), 2))
    )
    first, second, found = (run.serve() for run in (one, two, steered))
    for id in found:
        theta_1, theta_2 = vector(first[id].payload), vector(second[id].payload)
        expected = theta_2 - 0.1 * 0.5 * (theta_1 - vector(one.server.shared))
        np.testing.assert_allclose(vector(found[id].payload), expected, atol=1e-6)
        assert np.abs(expected - theta_2).max() > 1e-4


def test_the_larger_mu_the_nearer_clients_stay(start):
    far = []
    for mu in (0.0, 0.1, 1.0, 5.0):
        run = start(prox(mu), **EXACT)
        sent = run.serve("client_000")["client_000"].payload
        far.append(np.linalg.norm(vector(sent) - vector(run.server.shared)))
    assert far == sorted(far, reverse=True)
    assert far[3] < 0.8 * far[0]


@pytest.mark.parametrize("head", ["shared", "local"])
def test_the_anchor_is_what_was_received(paper, clients, vector_adapter, fake_local, head):
    method, adapter = FedProx(head=head, mu=0.3), vector_adapter(paper)
    local = fake_local(clients[0], adapter)
    downlink = GlobalAdapter(paper.vectors["lora"] + 1, paper.head() + 1 if head == "shared" else None)
    method.train_client(adapter, method.init_client(paper, clients[0]), downlink, local)
    (call,) = local.calls
    assert isinstance(call["steering"], Proximal)
    assert call["steering"].weight == 0.3
    assert set(call["steering"].anchor) == ({"lora", "head"} if head == "shared" else {"lora"})
    assert np.array_equal(call["steering"].anchor["lora"], paper.vectors["lora"] + 1)


def test_tiers_are_anchored_to_what_they_hold(start):
    """With SGD and a large μ the client of rank 1 stays near its own part of the server's values."""
    tiers = {"weak": {"clients": ["client_000"], "lora_rank": 1}, "rest": {"share": 1.0}}
    far = []
    for mu in (0.0, 5.0):
        run = start(prox(mu), **EXACT, clients__tiers=tiers)
        down = {id: sent.payload for id, sent in _downlinks(run).items()}
        sent = run.serve("client_000")["client_000"].payload
        far.append(np.linalg.norm(sent.adapter - down["client_000"].adapter))
    assert far[1] < 0.8 * far[0]


def _downlinks(run):
    return {task.client.id: task.downlink for task in run.tasks(["client_000"])}


def test_what_cannot_be_is_refused(start):
    with pytest.raises(ConfigError, match=r"'fedprox': mu: got -1"):
        start(prox(-1))
    with pytest.raises(ConfigError, match=r"'fedprox': train\(steering=.*is a rotation.*use adapter: lora"):
        start(prox(0.1, adapter="reft"))
    start(prox(0.1, adapter="reft"), reft__kind="nodireft").round()
