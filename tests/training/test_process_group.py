"""Several processes that train one client together, for real: torch's gloo between them."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from teams import together

from fedray.training.process_group import SINGLE_PROCESS, ProcessGroup, ProcessLost
from fedray.training.steering import Proximal, Shift
from fedray.training.torch_engine import TorchEngine
from fedray.training.trainer import EngineBackend, LocalTrainer


def with_team(local: LocalTrainer, process_group: ProcessGroup, **train: Any) -> LocalTrainer:
    """The same client's round, of another process_group."""
    training_context = local._training_context
    training_context = replace(training_context, train=training_context.train.model_copy(update=train))
    engine = TorchEngine(local._backend.adapter, process_group=process_group)
    return LocalTrainer(
        EngineBackend(engine, training_context),
        local._shard,
        local.client,
        local.server_round,
        training_context,
        local.measures,
    )


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
@pytest.mark.parametrize("size", [2, 3])
def test_a_team_is_one_worker_with_a_larger_batch(adapt, trainer, tmp_path, task, size) -> None:
    """23 examples in batches of 4: a step of two is 8, and the last one, 7, has a short part; a step of three is 12,
    and the last one, 11. Epochs, AdamW and clipping over the whole gradient."""
    train = {"epochs": 3, "clip": 0.05, "weight_decay": 0.1, "lr": 0.01}

    def silo(process_group: ProcessGroup) -> Any:
        adapter = adapt(task)
        local = trainer(adapter, task, num_examples=23, measure=True, **train)
        local = with_team(local, process_group, accumulation=size)
        local.train()
        return adapter.read("lora"), local.report

    adapter = adapt(task)
    before = adapter.read("lora")
    one = trainer(adapter, task, num_examples=23, measure=True, **{**train, "batch_size": 4 * size})
    one.train()
    moved = np.linalg.norm(adapter.read("lora") - before)
    members = together(size, silo, tmp_path / "store")
    for values, report in members:
        assert np.linalg.norm(values - adapter.read("lora")) < 1e-5 * moved
        assert np.array_equal(values, members[0][0])
        assert report.train_loss == pytest.approx(one.report.train_loss, rel=1e-6)
        assert report.evaluations == members[0][1].evaluations
        assert report.evaluation("personalised").loss == pytest.approx(
            one.report.evaluation("personalised").loss, rel=1e-5
        )


def test_with_dropout_a_team_is_one_process_that_takes_all_micro_batches(adapt, trainer, tmp_path) -> None:
    def silo(process_group: ProcessGroup) -> Any:
        adapter = adapt(dropout=0.3)
        with_team(trainer(adapter, num_examples=19, epochs=2), process_group, accumulation=2).train()
        return adapter.read("lora")

    adapter = adapt(dropout=0.3)
    trainer(adapter, num_examples=19, epochs=2, accumulation=2).train()
    for values in together(2, silo, tmp_path / "store"):
        np.testing.assert_allclose(values, adapter.read("lora"), rtol=0, atol=1e-6)


def test_parts_steering_and_mean_gradients_of_a_team_are_those_of_one_worker(adapt, trainer, tmp_path) -> None:
    """Steering is added once, to the sum of all members' gradients."""

    def work(local: LocalTrainer) -> Any:
        adapter = local._backend.adapter
        anchor = {name: 0 * adapter.read(name) for name in adapter.names}
        means = [
            local.train(["head"], steering=Proximal(anchor, 0.5), mean_gradient=True),
            local.train(["lora.B"], steps=3, steering=Shift({"lora": anchor["lora"] + 0.1}), mean_gradient=True),
        ]
        return [adapter.read("lora"), adapter.read("head"), *(mean[name] for mean in means for name in adapter.names)]

    def silo(process_group: ProcessGroup) -> Any:
        return work(with_team(trainer(adapt(dropout=0.3), num_examples=19, epochs=2), process_group, accumulation=2))

    expected = work(trainer(adapt(dropout=0.3), num_examples=19, epochs=2, accumulation=2))
    for found in together(2, silo, tmp_path / "store"):
        for vector, wanted in zip(found, expected, strict=True):
            np.testing.assert_allclose(vector, wanted, rtol=0, atol=1e-6)


def test_a_loss_that_is_not_finite_ends_the_round_of_every_member(adapt, trainer, tmp_path) -> None:
    def silo(process_group: ProcessGroup) -> str:
        with pytest.raises(Exception, match="not finite") as found:
            with_team(trainer(adapt(), num_examples=16, lr=1e30, epochs=9), process_group, accumulation=2).train()
        return type(found.value).__name__

    assert together(2, silo, tmp_path / "store") == ["TrainingError", "TrainingError"]


def test_gradients_are_added_up_and_missing_ones_stay_missing(tmp_path) -> None:
    """Of three parameters the second has a gradient in one member, the third in none."""

    def work(process_group: ProcessGroup) -> Any:
        parameters = [torch.zeros(2, requires_grad=True) for _ in range(3)]
        parameters[0].grad = torch.tensor([1.0, 2.0]) * (process_group.rank + 1)
        if process_group.rank == 1:
            parameters[1].grad = torch.tensor([5.0, 7.0])
        process_group.sum_gradients(parameters)
        return [None if p.grad is None else p.grad.tolist() for p in parameters], process_group.from_first(
            lambda: process_group.rank
        )

    assert together(2, work, tmp_path / "store") == [([[3.0, 6.0], [5.0, 7.0], None], 0)] * 2


def test_a_member_that_is_gone_is_named_as_such(tmp_path) -> None:
    def work(process_group: ProcessGroup) -> Any:
        process_group.sum(torch.ones(2))  # all are connected
        if process_group.rank == 1:
            return None
        with pytest.raises(ProcessLost, match="another process is gone"):
            _ = [process_group.sum(torch.ones(2)) for _ in range(100)]  # the first ones may still be buffered
        return "noticed"

    assert together(2, work, tmp_path / "store") == ["noticed", None]


def test_alone_nothing_is_exchanged() -> None:
    parameter = torch.zeros(2, requires_grad=True)
    SINGLE_PROCESS.sum_gradients([parameter])
    assert parameter.grad is None
    assert SINGLE_PROCESS.sum(torch.ones(2)).tolist() == [1.0, 1.0]
    assert SINGLE_PROCESS.from_first(lambda: 3) == 3
    assert all(SINGLE_PROCESS.mine(index) for index in range(5))
