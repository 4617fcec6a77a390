"""Models restored from a run's folder: they have the losses that the run measured with them."""

import pytest
import torch
from every_method import entry
from tiny import TINY_LLAMA, tiny_bert

import fedray
from fedray.errors import ConfigError, StateError
from fedray.evaluation.evaluate import evaluate
from fedray.experiment.restore import FinishedRun, restore
from fedray.methods.registry import METHODS
from fedray.results.run_result import RunResult

HEADS = ("head_only", "fedper", "fedrep", "fedbabu")
"""Methods about the task head, which a language model does not have."""

KINDS = (
    {"name": "fedavg", "label": "reft", "adapter": "reft"},
    "fedalt",  # a second branch and a mixer
    {"name": "fedhft", "timing": "pre"},  # only some rows of B exist
    "feddpa",  # what examples are compared with
    "ifca",  # evaluates before it trains
    "hetlora",  # a state of numbers only
)
"""Methods that differ in what has to be restored."""


def experiment(method, **fields):
    """Return a run of a decoder of one block, on two tiers: two clients that hold less, and one that holds all."""
    weak = {"clients": ["client_000", "client_002"], "lora_rank": 1, "mask_ratio": 0.5}
    return {
        "runtime": "inline",
        "device": "cpu",
        "rounds": 2,
        "seed": 3,
        "method": method,
        "task": "causal_lm",
        "model": {"path": "random", "tokenizer": "bytes", "config": {**TINY_LLAMA, "initializer_range": 0.3}},
        "data": {"source": "synthetic", "examples_per_client": 10, "max_length": 32},
        "partition": {"kind": "by_file", "validation_fraction": 0.2, "test_fraction": 0.2},
        "clients": {"count": 3, "tiers": {"weak": weak, "whole": {"clients": ["client_001"]}}},
        "train": {"lr": 2e-2, "max_steps": 1, "batch_size": 4},
        "lora": {"rank": 2, "alpha": 8, "targets": ["q_proj"]},
        "reft": {"rank": 2, "positions": "f2+l2"},
        **fields,
    }


def check(run):
    """Check a weak client's models at both moments, and the server's where there is one, by the losses that the run
    measured with them; return the methods whose server has a model."""
    finished = FinishedRun(run)
    table = run.clients().query("phase == 'final'").set_index(["method", "client"])

    def loss(restored, client):
        tested = finished.data.shards[client].tables["test"]
        assert not restored.model.training
        return evaluate(restored.model, tested, run.config.task, (), 4, restored.tokenizer.pad_token_id, "cpu").loss

    def measured(method, client, moment):
        return pytest.approx(table.loc[(method, client), f"{moment}_loss"], rel=2e-5)

    served = []
    for method in (summary.method for summary in run.summaries):
        for moment in ("aggregated", "personalised"):
            restored = restore(run.place, method, "client_002", moment=moment)
            assert restored.client.tier == "weak"
            assert loss(restored, "client_002") == measured(method, "client_002", moment), (method, moment)
        try:
            restored = restore(run.place, method)
        except ConfigError:
            continue
        served.append(method)  # its model is that of the client that holds all of it
        assert loss(restored, "client_001") == measured(method, "client_001", "aggregated"), method
    return served


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fedray.run(experiment(list(KINDS)), output=tmp_path_factory.mktemp("restore") / "run")


def test_clients_and_servers_come_back(run):
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    assert check(run) == ["reft", "hetlora"]
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before


@pytest.mark.slow
def test_every_method_comes_back(tmp_path):
    methods = [entry(name) for name in METHODS.names if name not in HEADS]
    assert len(check(fedray.run(experiment(methods), output=tmp_path / "run"))) > 5


def test_classifiers_come_back_with_their_heads(tmp_path):
    """Whether clients keep their heads, or no state has them because they never train."""
    methods = [{"name": "fedavg", "label": head, "head": head} for head in ("local", "frozen_random")]
    fields = {"model": tiny_bert(), "task": "classification", "lora": {"rank": 2}}
    run = fedray.run(experiment(methods, **fields), output=tmp_path / "run")
    assert check(run) == ["frozen_random"]
    restored = restore(run.place, "local", "client_000")
    assert len(restored.label_names) == restored.model.config.num_labels


def test_what_cannot_be_restored_is_said(run, tmp_path):
    for arguments, message in (
        ({}, "method: .* has reft, fedalt, fedhft, feddpa, ifca, hetlora; name one"),
        ({"method": "fedal"}, r"no finished method 'fedal' \(did you mean 'fedalt'\?\)"),
        ({"method": "fedalt"}, "fedalt: the server has no model of its own"),
        ({"method": "fedalt", "client": "client_0"}, r"no client 'client_0' \(did you mean"),
        ({"method": "fedalt", "client": "client_000", "device": "cuda"}, "device: cuda, but torch finds no GPU"),
    ):
        if "device" in arguments and torch.cuda.is_available():
            continue
        with pytest.raises(ConfigError, match=message):
            restore(run.place, **arguments)
    settings = experiment("local", checkpoint={"every": 0})
    plain = fedray.run(settings, output=tmp_path / "plain")
    assert restore(plain.place, client="client_000").client.id == "client_000"
    with pytest.raises(StateError, match=r"has no checkpoint \(checkpoint.every: 0 saves none\)"):
        restore(plain.place, client="client_000", moment="aggregated")
    (file,) = plain.path.glob("adapters/local/clients/*000*")
    file.write_bytes(b"damaged")
    with pytest.raises(StateError, match="cannot be read"):
        restore(plain.place, client="client_000")
    file.unlink()
    finished = FinishedRun(RunResult.load(plain.place))
    local = finished.entry("local")
    with pytest.raises(StateError, match="does not exist; the client did not finish the final pass"):
        finished.check(local, finished.client(local, "client_000"), "personalised")
