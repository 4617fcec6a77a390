"""Ditto: the common model is FedAvg's, and each client keeps a personal one beside it."""

import numpy as np
import pytest

from fedray.methods.bases.shared_adapter import GlobalAdapter
from fedray.methods.ditto import Ditto
from fedray.training.trainer import evaluate_client

IDS = ("client_000", "client_001", "client_002")


def ditto(lam, **changes):
    return {"name": "ditto", "lam": lam, **changes}


def test_the_common_model_is_fedavgs(start):
    """Bit for bit, whatever the personal models do."""
    plain, run, other = start("fedavg"), start(ditto(1.0)), start(ditto(0.0))
    for each in (plain, run, other):
        each.rounds(3)
    assert np.array_equal(run.server.shared.adapter, plain.server.shared.adapter)
    assert np.array_equal(run.server.shared.head, plain.server.shared.head)
    assert not np.array_equal(other.state(IDS[0]).personal["lora"], run.state(IDS[0]).personal["lora"])


@pytest.mark.parametrize("head", ["shared", "local"])
def test_without_its_term_personal_models_are_trained_alone(start, head):
    """Those of `local`, bit for bit: the same draws, the same batches."""
    run, alone = start(ditto(0.0), head=head), start("local")
    run.rounds(3)
    alone.rounds(3)
    for id in IDS:
        assert np.array_equal(run.state(id).personal["lora"], alone.state(id).adapter)
        assert np.array_equal(run.state(id).personal["head"], alone.state(id).head)


def test_a_personal_step_by_hand(start):
    """One step of SGD in the second round: v' = v − η (g(v) + λ (v − w)), where λ = 0 gives v − η g(v). In the first
    round v = w, so the term is zero."""
    exact = {"train__optimizer": "sgd", "train__lr": 0.1, "train__weight_decay": 0, "train__schedule": "constant"}
    exact |= {"train__clip": None, "lora__dropout": 0.0, "train__max_steps": 1}
    free, held = (start(ditto(lam), **exact) for lam in (0.0, 2.0))
    free.round()
    held.round()
    before, sent = held.states(), {"lora": free.server.shared.adapter, "head": free.server.shared.head}
    after_free, after_held = free.serve(), held.serve()
    for id in IDS:
        for name, w in sent.items():
            v = before[id].personal[name]
            assert np.array_equal(v, free.state(id).personal[name])
            expected = after_free[id].state.personal[name] - 0.1 * 2.0 * (v - w)
            np.testing.assert_allclose(after_held[id].state.personal[name], expected, atol=1e-6)
            assert np.abs(v - w).max() > 1e-4


def test_the_personal_model_is_what_is_measured(start):
    """Before training it is the common model, as with FedAvg; after it the personal one."""
    run, plain = start(ditto(0.1), evaluation__every=1), start("fedavg", evaluation__every=1)
    run.round()
    plain.round()
    (task,), (same,) = run.tasks(IDS[:1], measure=True), plain.tasks(IDS[:1], measure=True)
    result = run.worker.train(task)
    for name, vector in result.state.personal.items():
        run.adapter.load(name, vector)
    found = evaluate_client(run.adapter, task.shard.tables["test"], run.worker.training_context)
    assert result.report.evaluation("personalised") == found
    assert result.report.evaluation("aggregated") == plain.worker.train(same).report.evaluation("aggregated")


def test_both_trainings_see_the_same_batches(paper, clients, vector_adapter, fake_local):
    method, adapter = Ditto(lam=0.5), vector_adapter(paper)
    local = fake_local(clients[0], adapter, lambda adapter: adapter.load("lora", adapter.read("lora") + 1))
    state = method.init_client(paper, clients[0])
    downlink = GlobalAdapter(paper.vectors["lora"] * 2, paper.head() * 2)
    uplink, after = method.train_client(adapter, state, downlink, local)
    first, second = local.calls
    assert first == {"measure": False}
    assert second.pop("steering").weight == 0.5
    assert second == {"phase": 0}
    np.testing.assert_array_equal(uplink.adapter, paper.vectors["lora"] * 2 + 1)
    np.testing.assert_array_equal(after.personal["lora"], paper.vectors["lora"] + 1)
    np.testing.assert_array_equal(state.personal["lora"], paper.vectors["lora"])


@pytest.mark.parametrize("head", ["frozen_label_text", "frozen_random"])
def test_a_frozen_head_is_not_kept(start, head):
    run = start(ditto(0.1), head=head)
    run.rounds(2)
    assert set(run.state(IDS[0]).personal) == {"lora"}


def test_a_tiers_personal_model_is_of_its_rank(start):
    tiers = {"weak": {"clients": ["client_000"], "lora_rank": 1}, "rest": {"share": 1.0}}
    run = start(ditto(0.1), clients__tiers=tiers)
    run.rounds(2)
    assert 2 * run.state("client_000").personal["lora"].size == run.state("client_001").personal["lora"].size


def test_an_absent_client_keeps_its_model(start):
    run = start(ditto(0.5), clients__per_round=2)
    run.round()
    for _ in range(3):
        before = run.states()
        present = {result.client.id for result in run.round().results}
        for id in before.keys() - present:
            assert np.array_equal(run.state(id).personal["lora"], before[id].personal["lora"])
