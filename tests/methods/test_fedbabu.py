"""FedBABU: FedAvg under the common random head, and fine-tuning for the evaluation alone."""

import numpy as np
import pytest
from tiny import TINY_LLAMA

from fedray.errors import ConfigError
from fedray.training.loop import Train, train_steps
from fedray.training.torch_engine import TorchEngine
from fedray.training.trainer import evaluate_client

IDS = ("client_000", "client_001", "client_002")


def fedbabu(tune_epochs=2, **changes):
    return {"name": "fedbabu", "tune_epochs": tune_epochs, **changes}


@pytest.mark.parametrize("every", [0, 1])
def test_the_body_is_fedavgs_under_a_frozen_random_head(start, every):
    """Bit for bit, whether or not rounds are measured, and so fine-tuned."""
    plain = start("fedavg", head="frozen_random", evaluation__every=every)
    run = start(fedbabu(), evaluation__every=every)
    plain.rounds(3)
    done = run.rounds(3)
    assert np.array_equal(run.server.shared.adapter, plain.server.shared.adapter)
    assert run.server.shared.head is None
    size = run.initial.layouts["lora"].size
    assert all(result.uplink_bytes == result.downlink_bytes == 4 * size for result in done[-1].results)
    assert done[-1].results[0].report.steps == (3 if every == 0 else 3 + 2 * 3)


def test_the_common_head_stays_at_its_draw(start):
    run, plain = start(fedbabu(), evaluation__every=1), start("fedavg", head="frozen_random")
    assert np.array_equal(run.initial.head(), plain.initial.head())
    run.rounds(2)
    for id in IDS:
        assert np.array_equal(run.state(id).head, run.initial.head())


def test_what_is_measured_is_the_tuned_model(start):
    """Both trainings by hand: the body in phase 0, then everything in phase 1."""
    run = start(fedbabu(), evaluation__every=1)
    run.round()
    (task,) = run.tasks(IDS[1:2], measure=True)
    result = run.worker.train(task)
    table, context = task.shard.tables["train"], run.worker.training_context
    run.adapter.load("lora", run.server.shared.adapter)
    run.adapter.load("head", run.initial.head())
    engine = TorchEngine(run.adapter)
    before = evaluate_client(run.adapter, task.shard.tables["test"], context)
    train_steps(engine, Train(table, IDS[1], 1, parts=("lora",)), context)
    assert np.array_equal(run.adapter.read("lora"), result.payload.adapter)
    assert np.array_equal(run.adapter.read("head"), run.initial.head())
    train_steps(engine, Train(table, IDS[1], 1, epochs=2, phase=1), context)
    after = evaluate_client(run.adapter, task.shard.tables["test"], context)
    assert (result.report.evaluation("aggregated"), result.report.evaluation("personalised")) == (before, after)
    assert not np.array_equal(run.adapter.read("head"), run.initial.head())


def test_without_tuning_the_common_model_is_measured(start):
    plain = start("fedavg", head="frozen_random", evaluation__every=1)
    run = start(fedbabu(0), evaluation__every=1)
    for one, other in zip(plain.rounds(2), run.rounds(2), strict=True):
        for expected, result in zip(one.results, other.results, strict=True):
            assert result.report.evaluation("personalised") == expected.report.evaluation("personalised")
            assert result.report.steps == expected.report.steps


def test_what_cannot_be_is_refused(start):
    with pytest.raises(ConfigError, match=r"'fedbabu': tune_epochs: got -1"):
        start(fedbabu(-1))
    with pytest.raises(ConfigError, match=r"'fedbabu': head: shared: this method's head is always 'frozen_random'"):
        start(fedbabu(head="shared"))
    with pytest.raises(ConfigError, match=r"method fedbabu: needs a task head; task `causal_lm` has none"):
        start(fedbabu(), task="causal_lm", model__config=TINY_LLAMA)
