"""FDLoRA: a global LoRA with momentum on the server, a personal one, and the fusion that an evaluation measures."""

from itertools import product

import numpy as np
import pytest
from agreement import agree, together

from fedray.data.shards import Shard
from fedray.errors import ConfigError
from fedray.methods.fdlora import FdLora
from fedray.training.trainer import evaluate_client

IDS = ("client_000", "client_001", "client_002")


def fdlora(**options):
    return {"name": "fdlora", **options}


def test_without_momentum_and_copies_it_is_fedavg(start):
    """Three rounds of two of three clients, bit for bit: round 0 is FedAvg's first one in both."""
    plain = start("fedavg", clients__per_round=2)
    run = start(fdlora(server_optimizer="sgd", interval=None), clients__per_round=2)
    for _ in range(3):
        plain.round()
        run.round()
        assert np.array_equal(run.server.common.shared.adapter, plain.server.shared.adapter)
        assert np.array_equal(run.server.common.shared.head, plain.server.shared.head)


def test_the_server_moves_by_nesterovs_momentum(start):
    """Round 0 takes the mean; then θ ← θ + η (Δ + β m) with m ← β m + Δ, for η = 0.7 and β = 0.9."""
    run = start("fdlora")
    weights = np.array([9, 5, 7]) / 21
    momentum = theta = 0.0
    for number in range(4):
        sent = [result.payload.adapter.astype(np.float64) for result in run.serve().values()]
        mean = np.tensordot(weights, sent, 1)
        run.round()
        if number == 0:
            theta = mean
        else:
            momentum = 0.9 * momentum + (mean - theta)
            theta = theta + 0.7 * (mean - theta + 0.9 * momentum)
        np.testing.assert_allclose(run.server.common.shared.adapter, theta, atol=1e-6)
        theta = run.server.common.shared.adapter.astype(np.float64)


def test_the_personal_lora_is_the_first_and_then_every_hth_own_one(start):
    """H = 2: rounds 0, 2 and 4."""
    run = start(fdlora(interval=2), rounds=6)
    personal = {}
    for number in range(5):
        sent = {id: result.payload.adapter for id, result in run.serve().items()}
        run.round()
        if number in (0, 2, 4):
            personal = sent
        for id in IDS:
            assert np.array_equal(run.state(id).personal, personal[id])


def test_a_late_client_takes_its_first_own_lora(start):
    run = start(fdlora(interval=None), clients__per_round=1, rounds=8)
    seen = {}
    for _ in range(8):
        expected = {id: result.payload.adapter for id, result in run.serve().items()}
        (result,) = run.round().results
        seen.setdefault(result.client.id, expected[result.client.id])
        assert np.array_equal(run.state(result.client.id).personal, seen[result.client.id])
    assert len(seen) > 1


def test_inner_steps_begin_after_the_first_stage(start):
    """Client 0 has 9 examples in batches of 4: 3 steps an epoch, and then one."""
    run = start(fdlora(inner_steps=1))
    assert [result.report.steps for result in run.serve().values()] == [3, 2, 2]
    run.round()
    assert [result.report.steps for result in run.serve().values()] == [1, 1, 1]


@pytest.mark.parametrize("split", ["validation", "train"])
def test_an_evaluation_is_of_the_best_fusion(start, split):
    """All w in {0, 1/2, 1}², evaluated one by one; where there are no validation examples, on the training ones."""
    run = start(fdlora(levels=3, interval=None), partition__validation_fraction=0.3)
    run.rounds(2)
    (task,) = run.tasks(IDS[:1], measure=True)
    if split == "train":
        tables = {**task.shard.tables, "validation": task.shard.tables["validation"].slice(0, 0)}
        task = task._replace(shard=Shard(task.shard.client, tables))
    result = run.worker.train(task)
    shared, personal, adapter = result.payload.adapter, result.state.personal, run.adapter
    context, losses = run.worker.training_context, {}
    for w in product((0, 0.5, 1), repeat=2):
        adapter.load("lora", (w[0] * shared + w[1] * personal).astype(np.float32))
        adapter.load("head", result.payload.head)
        losses[w] = evaluate_client(adapter, task.shard.tables[split], context).loss
    best = min(losses.values())
    recorded = result.report.recorded["global_weight"], result.report.recorded["personal_weight"]
    assert losses[recorded] == pytest.approx(best, rel=1e-5)
    adapter.load("lora", (recorded[0] * shared + recorded[1] * personal).astype(np.float32))
    measured = evaluate_client(adapter, task.shard.tables["test"], context)
    assert result.report.evaluation("personalised").loss == pytest.approx(measured.loss, rel=1e-5)


def test_equal_losses_choose_the_global_lora(vector_adapter, fake_local, clients, paper):
    """With two levels: (1, 0) is the global LoRA, (0, 1) the personal one; which one is loaded follows the loss."""

    shared, personal = (
        np.ones(paper.layouts["lora"].size, np.float32),
        np.full(paper.layouts["lora"].size, 3, np.float32),
    )
    adapter = vector_adapter(paper)
    for loss, weights in ((lambda a: 0.0, (1, 0)), (lambda a: abs(float(a.read("lora")[0]) - 3), (0, 1))):
        local = fake_local(clients[0], adapter, loss=loss)
        FdLora(levels=2)._fuse(adapter, shared, personal, local)
        assert (local.recorded["global_weight"], local.recorded["personal_weight"]) == weights
        assert np.array_equal(adapter.read("lora"), weights[0] * shared + weights[1] * personal)


def test_what_is_sent_is_fedavgs(start):
    run, plain = start("fdlora"), start("fedavg")
    cost, common = (one.prepared.costs[name]["default"] for one, name in ((run, "fdlora"), (plain, "fedavg")))
    assert (cost.trainable, cost.uplink, cost.downlink) == (common.trainable, common.uplink, common.downlink)
    run.rounds(2)
    assert run.method.aggregate_train(run.server, [])[0] is run.server


def test_clients_in_one_step_are_as_one_by_one(start):
    run = start(fdlora(levels=2, inner_steps=2))
    run.rounds(2)
    tasks = run.tasks(IDS, measure=True)
    agree(together(run.worker, tasks), [run.worker.train(task) for task in tasks])


def test_tiers_of_unequal_rank(start):
    tiers = {"weak": {"clients": [IDS[0], IDS[2]], "lora_rank": 1}, "strong": {"clients": [IDS[1]]}}
    run = start("fdlora", clients__tiers=tiers)
    run.rounds(3)
    assert [result.state.personal.size for result in run.serve().values()] == [128, 256, 128]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter": "reft"}, "fdlora.adapter: reft has no factors A and B, which FDLoRA fuses; use adapter: lora"),
        ({"interval": 0}, "interval: got 0"),
        ({"inner_steps": 0}, "inner_steps: got 0"),
        ({"levels": 1}, "levels: got 1"),
    ],
)
def test_bad_options_are_refused(start, options, message):
    with pytest.raises(ConfigError, match=message):
        start(fdlora(**options))
