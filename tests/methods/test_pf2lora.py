"""PF2LoRA: FedAvg of one LoRA, and a personal one of small rank that trains in turns with it."""

import numpy as np
import pytest
import torch
from agreement import agree, together

from fedray.errors import ConfigError
from fedray.evaluation.losses import score
from fedray.methods.bases.shared_adapter import ClientState
from fedray.training.loop import Train, steps
from fedray.training.process_group import SINGLE_PROCESS

IDS = ("client_000", "client_001", "client_002")


def test_without_a_personal_rank_it_is_fedavg(start):
    """Bit for bit, and nothing else is kept or attached."""
    run, plain = start({"name": "pf2lora", "personal": 0}), start("fedavg")
    run.rounds(2)
    plain.rounds(2)
    assert np.array_equal(run.server.shared.adapter, plain.server.shared.adapter)
    assert np.array_equal(run.server.shared.head, plain.server.shared.head)
    assert run.adapter.names == plain.adapter.names
    assert {type(state) for state in run.states().values()} == {ClientState}


def test_a_round_is_a_personal_training_and_then_a_common_one(start):
    """With plain SGD and one step each, by the gradients of the model y = W0 x + s B A x + s D C x: first of C and D,
    then, at the new C and D, of A, B and the head."""
    exact = {"train__optimizer": "sgd", "train__weight_decay": 0, "train__schedule": "constant", "train__clip": None}
    run = start({"name": "pf2lora", "interval": 1}, lora__dropout=0.0, **exact)
    run.rounds(2)
    adapter, context, results = run.adapter, run.worker.training_context, run.serve()
    states, lr = run.states(), run.config.train.lr
    for id in IDS:
        values = {"lora": run.server.shared.adapter, "rest": states[id].private, "head": run.server.shared.head}
        for names, phase in ((["rest"], 1), (["lora", "head"], 0)):
            for name, vector in values.items():
                adapter.load(name, vector)
            table = run.pool.shards[id].tables["train"]
            batch = next(steps(Train(table, id, 2, phase=phase), context, SINGLE_PROCESS)).micro_batches[0]
            parameters = [entry.parameter for name in names for entry in adapter.entries(name)]
            for parameter in parameters:
                parameter.requires_grad_(True)
            loss = score(adapter.model, batch, "classification").losses.mean()
            gradients = torch.autograd.grad(loss, parameters)
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients]).numpy()
            for name in names:
                size = len(values[name])
                values[name] = values[name] - lr * flat[:size]
                flat = flat[size:]
        np.testing.assert_allclose(results[id].state.private, values["rest"], atol=1e-6)
        np.testing.assert_allclose(results[id].payload.adapter, values["lora"], atol=1e-6)
        np.testing.assert_allclose(results[id].payload.head, values["head"], atol=1e-6)
        assert np.abs(results[id].state.private - states[id].private).max() > 1e-5


def test_personal_loras_stay_with_their_clients(start):
    """D is 0 and C the common draw before the first training; absent clients keep theirs; what is sent is FedAvg's."""
    run, plain = start({"name": "pf2lora", "personal": 1}, clients__per_round=1), start("fedavg")
    first = run.method.init_client(run.initial, run.prepared.clients[0])
    views = run.views("rest", first.private)
    assert not any(view.any() for name, view in views.items() if name.endswith(".B"))
    assert all(np.abs(view).max() > 0 for name, view in views.items() if name.endswith(".A"))
    (result,) = run.round().results
    before = run.states()
    (other,) = run.round().results
    if other.client.id != result.client.id:
        assert np.array_equal(run.state(result.client.id).private, before[result.client.id].private)
    cost = run.prepared.costs["pf2lora"]["default"]
    common = plain.prepared.costs["fedavg"]["default"]
    assert (cost.uplink, cost.downlink) == (common.uplink, common.downlink)
    assert cost.trainable == common.trainable + run.initial.layouts["rest"].size


def test_steps_are_counted_for_each(start):
    run = start({"name": "pf2lora", "interval": 3})
    assert {result.report.steps for result in run.serve().values()} == {6}


def test_clients_in_one_step_are_as_one_by_one(start):
    run = start({"name": "pf2lora", "interval": 2})
    run.round()
    tasks = run.tasks(IDS, measure=True)
    agree(together(run.worker, tasks), [run.worker.train(task) for task in tasks])


def test_tiers_of_unequal_rank(start):
    """The common LoRA has the tier's rank, the personal one its own."""
    tiers = {"weak": {"clients": [IDS[0], IDS[2]], "lora_rank": 1}, "strong": {"clients": [IDS[1]]}}
    run = start({"name": "pf2lora", "personal": 3}, clients__tiers=tiers)
    run.rounds(2)
    sizes = {id: (result.payload.adapter.size, result.state.private.size) for id, result in run.serve().items()}
    assert sizes == {IDS[0]: (128, 384), IDS[1]: (256, 384), IDS[2]: (128, 384)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter": "reft"}, "pf2lora.adapter: reft has no branch for a personal LoRA; use adapter: lora"),
        ({"personal": -1}, "personal: got -1"),
        ({"interval": 0}, "interval: got 0"),
    ],
)
def test_bad_options_are_refused(start, options, message):
    with pytest.raises(ConfigError, match=message):
        start({"name": "pf2lora", **options})
