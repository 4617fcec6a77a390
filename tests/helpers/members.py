"""Clients whose code trains their adapters, as members of one stack and each alone."""

import numpy as np
import pytest

from fedray.adapters.stacked import AdapterStack
from fedray.training.batched import run_batched
from fedray.training.trainer import LocalTrainer

CLIENTS = {"ann": 11, "bob": 4, "cid": 9, "dee": 1}


def first_values(adapter, client):
    """Every client starts elsewhere, as it does in its second round."""
    rng = np.random.default_rng(sum(map(ord, client)))
    values = {name: adapter.read(name) for name in adapter.names}
    return {name: (vector + rng.normal(0, 0.05, vector.size)).astype(np.float32) for name, vector in values.items()}


def one_round(work, local, values, training=lambda local: local.train()):
    """A method in short: load, train, read."""
    mine = LocalTrainer(work, local._shard, local.client, local.server_round, local._training_context, local.measures)
    for name, vector in values.items():
        work.adapter.load(name, vector)
    training(mine)
    return np.concatenate([work.adapter.read(name) for name in work.adapter.names]), mine.report


def alone(adapter, locals_, values, *training):
    return {name: one_round(local._backend, local, values[name], *training) for name, local in locals_.items()}


def fused(adapter, locals_, values, members=None, training=()):
    def piece(name):
        return lambda member: one_round(member, locals_[name], values[name], *training)

    stack = AdapterStack(adapter, members or len(locals_))
    training_context = next(iter(locals_.values()))._training_context
    return dict(zip(locals_, run_batched(stack, training_context, 1.0, [piece(name) for name in locals_]), strict=True))


def compare(ours, expected, starts):
    for name, (values, report) in ours.items():
        wanted, wanted_report = expected[name]
        start = np.concatenate([*starts[name].values()])
        assert np.linalg.norm(wanted - start) > 1e-3  # it trained
        assert np.linalg.norm(values - wanted) < 1e-5 * np.linalg.norm(wanted)
        assert report.steps == wanted_report.steps
        assert report.train_loss == pytest.approx(wanted_report.train_loss, rel=1e-5)
        for moment in ("aggregated", "personalised"):
            measured, same = report.evaluation(moment), wanted_report.evaluation(moment)
            assert (measured is None) == (same is None)
            if same is not None:
                assert measured.loss == pytest.approx(same.loss, rel=1e-5)
                assert measured.metric == pytest.approx(same.metric, abs=1e-5)
