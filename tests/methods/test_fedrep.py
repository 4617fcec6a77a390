"""FedRep: the head is trained first, then the body with it; only the body travels."""

import numpy as np
import pytest
from lora_clients import uploads
from tiny import TINY_LLAMA

from fedray.errors import ConfigError
from fedray.methods.bases.shared_adapter import GlobalAdapter
from fedray.methods.fedrep import FedRep
from fedray.training.loop import Train, train_steps
from fedray.training.torch_engine import TorchEngine

IDS = ("client_000", "client_001", "client_002")


def fedrep(head_epochs=2, **changes):
    return {"name": "fedrep", "head_epochs": head_epochs, **changes}


def test_a_round_is_two_trainings(start):
    """Each on its own, by hand: the head for two epochs while the body rests, then the body while the head rests."""
    run = start(fedrep())
    run.round()
    states, shared, results = run.states(), run.server.shared, run.serve()
    engine, context = TorchEngine(run.adapter), run.worker.training_context
    for id in IDS:
        run.adapter.load("lora", shared.adapter)
        run.adapter.load("head", states[id].head)
        table = run.pool.shards[id].tables["train"]
        train_steps(engine, Train(table, id, 1, parts=("head",), epochs=2), context)
        assert np.array_equal(run.adapter.read("lora"), shared.adapter)
        assert np.array_equal(run.adapter.read("head"), results[id].state.head)
        train_steps(engine, Train(table, id, 1, parts=("lora",), phase=1), context)
        assert np.array_equal(run.adapter.read("head"), results[id].state.head)
        assert np.array_equal(run.adapter.read("lora"), results[id].payload.adapter)
        assert not np.array_equal(run.adapter.read("lora"), shared.adapter)


def test_the_body_is_averaged_and_no_head_travels(start):
    run = start(fedrep())
    for _ in range(2):
        sent = uploads(run)
        done = run.round()
        size = run.initial.layouts["lora"].size
        assert all(result.uplink_bytes == result.downlink_bytes == 4 * size for result in done.results)
        expected = sum(n * update.payload.adapter.astype(float) for n, update in zip((9, 5, 7), sent, strict=True)) / 21
        np.testing.assert_allclose(run.server.shared.adapter, expected, atol=1e-6)
    assert run.server.shared.head is None
    assert len({run.state(id).head.tobytes() for id in IDS}) == 3


def test_steps_are_those_of_both(start):
    """9 examples in batches of 4 are 3 steps an epoch: 2 · 3 of the head, 3 of the body."""
    run = start(fedrep())
    assert run.serve(IDS[0])[IDS[0]].report.steps == 9


def test_only_the_last_training_is_measured(paper, clients, vector_adapter, fake_local):
    method, adapter = FedRep(head_epochs=3), vector_adapter(paper)
    local = fake_local(clients[0], adapter)
    state, downlink = method.init_client(paper, clients[0]), GlobalAdapter(paper.vectors["lora"], None)
    method.train_client(adapter, state, downlink, local)
    assert local.calls == [{"parts": ("head",), "epochs": 3, "measure": False}, {"parts": ("lora",)}]


def test_an_absent_client_keeps_its_head(start):
    run = start(fedrep(), clients__per_round=2)
    run.round()
    for _ in range(3):
        before = run.states()
        present = {result.client.id for result in run.round().results}
        for id in before.keys() - present:
            assert np.array_equal(run.state(id).head, before[id].head)


def test_what_cannot_be_is_refused(start):
    with pytest.raises(ConfigError, match=r"'fedrep': head_epochs: got 0"):
        start(fedrep(0))
    with pytest.raises(ConfigError, match=r"method fedrep: needs a task head; task `causal_lm` has none"):
        start(fedrep(), task="causal_lm", model__config=TINY_LLAMA)
