"""FedDPA: the global LoRA is FedAvg's, the local one trains beside it or from it, and every example has its weight."""

import numpy as np
import pytest
import torch
from agreement import agree, together
from tiny import TINY_LLAMA

from fedray.errors import ConfigError
from fedray.evaluation.losses import score
from fedray.methods.bases.shared_adapter import ClientState
from fedray.randomness import keyed_rng
from fedray.training.loop import Train, steps
from fedray.training.process_group import SINGLE_PROCESS

IDS = ("client_000", "client_001", "client_002")
EXACT = {
    "train__optimizer": "sgd",
    "train__weight_decay": 0,
    "train__schedule": "constant",
    "train__clip": None,
    "train__max_steps": 1,
    "lora__dropout": 0.0,
}
DECODER = {**TINY_LLAMA, "num_hidden_layers": 2, "max_position_embeddings": 128, "initializer_range": 0.2}


def feddpa(variant="T", **options):
    return {"name": "feddpa", "variant": variant, **options}


@pytest.mark.parametrize("variant", ["T", "F"])
def test_the_global_lora_is_fedavgs(start, variant):
    """Three measured rounds of two of three clients; the mean is uniform."""
    changes = {"clients__per_round": 2, "evaluation__every": 1}
    run, plain = start(feddpa(variant), **changes), start({"name": "fedavg", "weights": "uniform"}, **changes)
    for _ in range(3):
        done, same = run.round(), plain.round()
        np.testing.assert_allclose(run.server.shared.adapter, plain.server.shared.adapter, atol=1e-6)
        np.testing.assert_allclose(run.server.shared.head, plain.server.shared.head, atol=1e-6)
        for result, expected in zip(done.results, same.results, strict=True):
            assert result.report.evaluation("aggregated").loss == pytest.approx(
                expected.report.evaluation("aggregated").loss, rel=1e-5
            )


def test_the_local_lora_trains_beside_the_frozen_global_one(start):
    """One step of SGD in round 1 with y = W0 x + (1 − α) s B A x + α s B_k A_k x, α = 0.3; in round 0 there is none."""
    run = start(feddpa(alpha=0.3), **EXACT)
    first = {client.id: run.method.init_client(run.initial, client).private for client in run.prepared.clients}
    run.round()
    states, results = run.states(), run.serve()
    adapter, context = run.adapter, run.worker.training_context
    for id in IDS:
        assert np.array_equal(states[id].private, first[id])
        assert results[id].report.steps == 2
        values = {"lora": run.server.shared.adapter, "rest": states[id].private, "head": run.server.shared.head}
        weights = {"mixer.w_L": np.full(4, 0.7, np.float32), "mixer.w_R": np.full(4, 0.3, np.float32)}
        for name, vector in {**values, **weights}.items():
            adapter.load(name, vector)
        request = Train(run.pool.shards[id].tables["train"], id, 1, phase=1)
        batch = next(steps(request, context, SINGLE_PROCESS)).micro_batches[0]
        parameters = [entry.parameter for entry in adapter.entries("rest")]
        adapter.model.train()  # in evaluation every example has its own weight
        for parameter in parameters:
            parameter.requires_grad_(True)
        gradients = torch.autograd.grad(score(adapter.model, batch, "classification").losses.mean(), parameters)
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients]).numpy()
        expected = states[id].private - run.config.train.lr * flat
        np.testing.assert_allclose(results[id].state.private, expected, atol=1e-6)
        assert np.abs(flat).max() > 1e-4


def gate_by_hand(run, id, server_round, private, lam, instances):
    """λ times the mean direction of the instances' last hidden states under the local LoRA alone, and these states."""
    adapter = run.adapter
    for name, value in {"rest": private, "mixer.w_L": np.zeros(4), "mixer.w_R": np.ones(4)}.items():
        adapter.load(name, value.astype(np.float32))
    table = run.pool.shards[id].tables["train"]
    order = keyed_rng(run.config.seed, "instances", server_round, id).permutation(table.num_rows)[:instances]
    states = []
    adapter.model.train()  # the weights that were loaded; dropout is off in these tests
    for row in order:
        tokens = torch.tensor([table["input_ids"][int(row)].as_py()])
        with torch.no_grad():
            states.append(adapter.model(input_ids=tokens, output_hidden_states=True).hidden_states[-1][0, -1].numpy())
    adapter.model.eval()
    directions = [state / np.linalg.norm(state) for state in np.array(states, np.float64)]
    return lam * np.mean(directions, axis=0), directions


@pytest.mark.parametrize(("instances", "used"), [(1, 1), (3, 3), (99, 5)])
def test_examples_are_compared_with_random_training_examples(start, instances, used):
    """An example that is its only instance has α = λ. Client 1 has five training examples."""
    run = start(feddpa(lam=0.8, instances=instances), **{**EXACT, "evaluation__every": 1})
    run.round()
    (task,) = run.tasks(IDS[1:2], measure=True)
    result = run.worker.train(task)
    found = result.adapter["gate.lora_gate.v"].reshape(-1)
    expected, directions = gate_by_hand(run, IDS[1], 1, result.state.private, 0.8, instances)
    assert len(directions) == used
    np.testing.assert_allclose(found, expected, atol=1e-5)
    if instances == 1:
        assert found @ directions[0] == pytest.approx(0.8, abs=1e-5)


def test_without_similarity_the_global_lora_is_evaluated(start):
    """λ = 0: `personalised` is FedAvg's; with λ it is not, from the second round on."""
    changes = {"evaluation__every": 1}
    plain = start({"name": "fedavg", "weights": "uniform"}, **changes)
    none, some = start(feddpa(lam=0), **changes), start(feddpa(lam=1), **changes)
    for server_round in range(2):
        reports = [[result.report for result in run.round().results] for run in (plain, none, some)]
        for found in zip(*reports, strict=True):
            expected, same, other = (report.evaluation("personalised").loss for report in found)
            assert same == pytest.approx(expected, rel=1e-5)
            equal = other == pytest.approx(expected, rel=1e-5)
            assert equal == (server_round == 0)


def test_f_fine_tunes_from_the_global_lora_where_it_is_measured(start):
    """Nothing is kept; without a measurement nothing is fine-tuned."""
    run = start(feddpa("F"))
    run.round()
    (task,) = run.tasks(IDS[:1], measure=True)
    measured, other = run.worker.train(task), run.serve(IDS[0])[IDS[0]]
    assert measured.report.steps == 2 * other.report.steps
    assert type(measured.state) is ClientState
    assert np.array_equal(measured.payload.adapter, other.payload.adapter)
    local = {name: value for name, value in measured.adapter.items() if name.startswith("rest.")}
    received = run.views("rest", run.server.shared.adapter)
    assert all(np.abs(value - received[name.removeprefix("rest.")]).max() > 1e-4 for name, value in local.items())
    untouched = {name: value for name, value in other.adapter.items() if name.startswith("rest.")}
    assert all(np.array_equal(value, received[name.removeprefix("rest.")]) for name, value in untouched.items())


def test_local_loras_stay_with_absent_clients(start):
    run = start(feddpa())
    run.rounds(2)
    before = run.states()
    alone = run.federation.method.aggregate_train(run.server, [])
    assert alone[0] is run.server
    assert all(before[id].private.any() for id in IDS)
    cost = run.prepared.costs["feddpa"]["default"]
    lora, head = (run.initial.layouts[name].size for name in ("lora", "head"))
    assert (cost.trainable, cost.uplink, cost.downlink) == (2 * lora + head, lora + head, lora + head)


@pytest.mark.parametrize("variant", ["T", "F"])
@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_clients_in_one_step_are_as_one_by_one(start, variant, task):
    language = {"task": task, "model__config": DECODER, "evaluation__metric": "perplexity"}
    run = start(feddpa(variant), **(language if task == "causal_lm" else {}))
    run.round()
    tasks = run.tasks(IDS, measure=True)
    agree(together(run.worker, tasks), [run.worker.train(task) for task in tasks])


def test_tiers_of_unequal_rank(start):
    """Both LoRAs have the tier's rank."""
    tiers = {"weak": {"clients": [IDS[0], IDS[2]], "lora_rank": 1}, "strong": {"clients": [IDS[1]]}}
    run = start(feddpa(), clients__tiers=tiers)
    run.rounds(2)
    sizes = {id: (result.payload.adapter.size, result.state.private.size) for id, result in run.serve().items()}
    assert sizes == {IDS[0]: (128, 128), IDS[1]: (256, 256), IDS[2]: (128, 128)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter": "reft"}, "feddpa.adapter: reft has no branch for a personal LoRA; use adapter: lora"),
        ({"variant": "F", "alpha": 0.4}, "feddpa.alpha: has no effect without variant: T"),
        ({"alpha": 0}, "alpha: got 0"),
        ({"lam": 1.5}, "lam: got 1.5"),
        ({"instances": 0}, "instances: got 0"),
    ],
)
def test_bad_options_are_refused(start, options, message):
    with pytest.raises(ConfigError, match=message):
        start({"name": "feddpa", **options})
