"""The controls, and what holds for every method: a client's task depends on nobody else's."""

import numpy as np
import pytest
from received import received
from tiny import TINY_LLAMA

from fedray.adapters.lora import attach_lora
from fedray.errors import ConfigError
from fedray.models.backbone import load_backbone
from fedray.storage.state_tree import sha256
from fedray.training.loop import Train, train_steps
from fedray.training.torch_engine import TorchEngine

METHODS = [
    {"name": "local"},
    {"name": "head_only"},
    {"name": "fedavg"},
    {"name": "fedavg", "adapter": "reft"},
    {"name": "fedalt"},
    {"name": "fedreft"},
    {"name": "fedreft", "align": "procrustes"},
]


@pytest.mark.parametrize("head", ["shared", "local"])
def test_local_is_training_alone(start, head):
    """Each client's adapter and head after three rounds are, bit for bit, those of one adapter that nobody else ever
    touches, trained for the same steps. A shared head is private here, too."""
    run = start("local", head=head)
    run.rounds(3)
    config = run.config
    for client in run.prepared.clients:
        model = load_backbone(
            config.model, run.prepared.architecture, config.task, config.seed, "cpu", config.data.cache_dir
        )
        alone = attach_lora(model, config.lora)
        alone.load("lora", run.initial.vectors["lora"])
        alone.load("head", run.initial.head())
        table = run.prepared.data.shards[client.id].tables["train"]
        for server_round in range(3):
            train_steps(TorchEngine(alone), Train(table, client.id, server_round), run.worker.training_context)
        assert np.array_equal(run.state(client.id).adapter, alone.read("lora"))
        assert np.array_equal(run.state(client.id).head, alone.read("head"))
        assert not np.array_equal(alone.read("lora"), run.initial.vectors["lora"])


@pytest.mark.parametrize("head", ["shared", "local", "frozen_label_text", "frozen_random"])
@pytest.mark.parametrize("adapter", ["lora", "reft"])
def test_local_sends_nothing(start, head, adapter):
    run = start({"name": "local", "adapter": adapter}, head=head, train__max_steps=1)
    for done in run.rounds(2):
        assert all(result.uplink_bytes == result.downlink_bytes == 0 for result in done.results)
    assert run.federation.server.head is None
    assert (run.state("client_000").head is None) == head.startswith("frozen")
    if head.startswith("frozen"):
        assert np.array_equal(run.worker.adapter.read("head"), run.initial.head())


@pytest.mark.parametrize("head", ["shared", "local"])
@pytest.mark.parametrize("adapter", ["lora", "reft"])
def test_head_only_shares_the_head_alone(start, head, adapter):
    """Whatever `head` says. 9, 5 and 7 examples: the head is (9 h_0 + 5 h_1 + 7 h_2)/21, of 3 · 16 + 3 numbers, and
    the adapters stay where they were trained."""
    run = start({"name": "head_only", "adapter": adapter}, head=head)
    for _ in range(2):
        p, q, r = (result.payload.head for result in run.serve().values())
        results = run.round().results
        assert all(result.uplink_bytes == result.downlink_bytes == 4 * 51 for result in results)
        np.testing.assert_allclose(run.federation.server.head, (9 * p + 5 * q + 7 * r) / 21, atol=1e-6)
    states = [run.state(client.id) for client in run.prepared.clients]
    assert all(state.head is None for state in states)
    assert len({state.adapter.tobytes() for state in states}) == 3


def test_head_only_adapters_are_nobody_elses(start, fake_local):
    """A client begins its second round with the adapter that it ended its first with, and with everybody's head."""
    run = start("head_only")
    run.round()
    adapter, client, seen = run.worker.adapter, run.prepared.clients[1], {}
    down = received(run.method, run.federation.server, [client])[client.id]
    local = fake_local(client, adapter, lambda a: seen.update({name: a.read(name) for name in ("lora", "head")}))
    run.method.train_client(adapter, run.state(client.id), down, local)
    assert np.array_equal(seen["lora"], run.state(client.id).adapter)
    assert np.array_equal(seen["head"], run.federation.server.head)


def test_head_only_needs_a_head(start):
    with pytest.raises(ConfigError, match="head_only.*needs a task head.*causal_lm.*local"):
        start("head_only", task="causal_lm", model__config=TINY_LLAMA)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: "-".join(method.values()))
def test_a_task_depends_on_nobody_elses(start, method):
    """One worker serves all clients. In any order, and with the others or without them, a client's uplink, its next
    state and every tensor it trained are the same bits: nothing of one client is left for the next."""
    run = start(method, train__max_steps=2)
    run.round()
    orders = [
        ("client_000", "client_001", "client_002"),
        ("client_002", "client_001", "client_000"),
        ("client_001",),
    ]
    served = [run.serve(*order) for order in orders]
    for id in orders[0]:
        bits = {
            sha256([("up", results[id].payload), ("own", results[id].state), ("adapter", results[id].adapter)])
            for results in served
            if id in results
        }
        assert len(bits) == 1


@pytest.mark.parametrize("method", [METHODS[4], METHODS[5]], ids=["fedalt", "fedreft"])
def test_whole_rounds_in_another_order_of_service(start, method):
    """Two of three clients take part in each round; served the other way round, all states are the same bits."""
    run, backwards = (start(method, clients__per_round=2, train__max_steps=2) for _ in range(2))
    train = backwards.pool.train
    backwards.pool.train = lambda tasks: train(tasks[::-1])
    cohorts = [[result.client.id for result in done.results] for done in run.rounds(3)]
    backwards.rounds(3)
    assert len({tuple(cohort) for cohort in cohorts}) > 1
    assert sha256(run.federation.states()) == sha256(backwards.federation.states())
