"""Models restored from a run's folder: they have the losses that the run measured with them."""

import pytest
from every_method import entry
from tiny import TINY_LLAMA

import fedray
from fedray.evaluation.evaluate import evaluate
from fedray.experiment.restore import FinishedRun, restore
from fedray.methods.registry import METHODS

PEER = {"runtime": "inline", "device": "cpu", "rounds": 2, "seed": 3, "storage_path": "unused"}


def experiment(method, **fields):
    """Return a run of three clients with a decoder of one block."""
    return {
        **PEER,
        "method": method,
        "task": "causal_lm",
        "model": {"path": "random", "tokenizer": "bytes", "config": {**TINY_LLAMA, "initializer_range": 0.3}},
        "data": {"source": "synthetic", "examples_per_client": 12, "max_length": 48},
        "partition": {"kind": "by_file", "validation_fraction": 0.2, "test_fraction": 0.3},
        "clients": {"count": 3},
        "train": {"lr": 2e-2, "max_steps": 2, "batch_size": 4},
        "lora": {"rank": 2, "alpha": 8, "targets": ["q_proj", "v_proj"]},
        "reft": {"rank": 2, "positions": "f2+l2"},
        **fields,
    }


def loss_of(restored, table):
    """Return the loss of a restored model on a table."""
    model, tokenizer = restored.model, restored.tokenizer
    return evaluate(model, table, restored.config.task, (), 4, tokenizer.pad_token_id, "cpu").loss


def recorded(run):
    """Return the losses of the final pass, by method, client and moment."""
    table = run.clients().query("phase == 'final'").set_index(["method", "client"])
    return {
        (*key, moment): table.loc[key, f"{moment}_loss"]
        for key in table.index
        for moment in ("aggregated", "personalised")
    }


def check(run, only=None):
    """Check that every restored model has its recorded loss; return how many were checked."""
    finished, found = FinishedRun(run), recorded(run)
    keys = [key for key in found if only is None or key[1] in only]
    for method, client, moment in keys:
        restored = restore(run.place, method, client, moment=moment)
        assert not restored.model.training
        loss = loss_of(restored, finished.data.shards[client].tables["test"])
        assert loss == pytest.approx(found[method, client, moment], rel=2e-5), (method, client, moment)
    return len(keys)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    methods = [entry(name) for name in METHODS.names if name not in ("head_only", "fedper", "fedrep", "fedbabu")]
    more = [{"name": name, "label": f"{name}-reft", "adapter": "reft"} for name in ("fedavg", "fedalt")]
    return fedray.run(experiment([*methods, *more]), output=tmp_path_factory.mktemp("restore") / "run")


def test_every_method_s_clients_come_back(run):
    assert check(run) > 100
