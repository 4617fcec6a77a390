"""Clients trained together against the same clients one by one."""

import numpy as np
import pytest

from fedray.worker import Assignment

DECODER = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
LORA = [
    "local",
    {"name": "fedavg"},
    "head_only",
    {"name": "fedalt"},
    {"name": "fedalt", "mixer": "none"},
    {"name": "fedalt", "mixer": "fixed", "alpha": 0.3},
]
MASKED = [
    {"name": "fedhft", "timing": "post", "importance": "fisher"},
    {"name": "fedhft", "timing": "post", "importance": "energy"},
    {"name": "fedhft", "timing": "pre"},
]
REFT = [
    {"name": "fedavg", "adapter": "reft"},
    {"name": "fedreft", "mixing": "adaptive"},
    {"name": "fedreft", "mixing": "fixed"},
]


def turns_of(run, ids, measure=True):
    """What the worker is handed for these clients."""
    clients = {client.id: client for client in run.prepared.clients}
    downlinks = run.method.configure_train(run.federation.server, run.prepared.clients)
    return [
        (
            Assignment(clients[id], run.federation.server_round, measure, keep=True),
            downlinks[id],
            run.federation.client_states.get(id),
            run.pool.shards[id],
        )
        for id in ids
    ]


def together(worker, turns):
    return list(worker.train_many(*zip(*turns, strict=True)))


def numbers(value):
    """Every number in a payload, state or report, in order."""
    if hasattr(value, "__dataclass_fields__"):
        return [n for name in value.__dataclass_fields__ for n in numbers(getattr(value, name))]
    if isinstance(value, dict):
        return [n for key in sorted(value) for n in numbers(value[key])]
    if isinstance(value, list | tuple):
        return [n for item in value for n in numbers(item)]
    if isinstance(value, np.ndarray):
        return [value.reshape(-1)]
    return []


def distance(a, b):
    """‖a − b‖ / ‖b‖ over all arrays of two payloads."""
    left, right = (np.concatenate([*numbers(one), np.zeros(1)]).astype(np.float64) for one in (a, b))
    assert left.shape == right.shape
    return np.linalg.norm(left - right) / max(np.linalg.norm(right), 1e-30)


def agree(fused, alone):
    for (outcome, state), (expected, expected_state) in zip(fused, alone, strict=True):
        assert outcome.update.client == expected.update.client
        assert outcome.update.num_examples == expected.update.num_examples
        assert distance(outcome.tensors, expected.tensors) < 1e-5
        assert distance(outcome.update.payload, expected.update.payload) < 1e-5
        assert distance(state, expected_state) < 1e-5
        assert (outcome.uplink_bytes, outcome.downlink_bytes) == (expected.uplink_bytes, expected.downlink_bytes)
        report, wanted = outcome.report, expected.report
        assert report.steps == wanted.steps
        assert report.train_loss == pytest.approx(wanted.train_loss, rel=1e-5)
        assert report.seconds > 0
        for moment in ("aggregated", "personalised"):
            measured, same = getattr(report, moment), getattr(wanted, moment)
            assert measured.loss == pytest.approx(same.loss, rel=1e-5)
            assert measured.metric == pytest.approx(same.metric, rel=1e-5)
            assert measured.num_examples == same.num_examples
        assert report.recorded.keys() == wanted.recorded.keys()
        for name, value in wanted.recorded.items():
            assert report.recorded[name] == pytest.approx(value, rel=1e-5)


def moved(run, outcome):
    """How far a client's trained values are from where it would be without training."""
    return max(np.abs(tensor).max() for name, tensor in outcome.tensors.items() if name.endswith(".B")) > 0


IDS = ("client_000", "client_001", "client_002")


@pytest.mark.parametrize("method", [*LORA, *MASKED, *REFT], ids=str)
def test_together_is_as_one_by_one(start, method, caplog):
    """Two rounds: in the second FedALT has a rest of the world and a mixer that matters, FedReFT others to mix with.

    9, 5 and 7 examples in batches of 2, two of which make a step: 3, 2 and 2 steps an epoch, some of them short.
    """
    run = start(method, train__batch_size=2, train__accumulation=2, train__epochs=2)
    for _ in range(2):
        turns = turns_of(run, IDS)
        alone = [run.worker.train(*turn) for turn in turns]
        fused = together(run.worker, turns)
        agree(fused, alone)
        run.round()
    assert not caplog.records  # nothing fell back
