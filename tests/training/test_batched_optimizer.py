"""The optimizers of several clients as one against single ones."""

import numpy as np
import pytest
import torch

from fedray.config import TrainConfig
from fedray.training.batched_optimizer import BatchedOptimizer
from fedray.training.optimizer import RoundOptimizer
from fedray.training.schedule import Schedule


@pytest.mark.parametrize(
    "train",
    [
        {"weight_decay": 0.2, "clip": 0.7, "schedule": "linear", "head_lr": 0.03},
        {"optimizer": "sgd", "momentum": 0.6, "weight_decay": 0.2, "clip": None},
    ],
    ids=["adamw", "sgd"],
)
def test_optimizers_of_members_are_single_ones(adapt, train):
    """Members of 4, 3 and 3 steps; in the second step member 0 has no gradient for one parameter, in the third
    member 1 for another: a parameter's moments and its count of steps then stay."""
    config = TrainConfig(lr=0.05, **train)
    numbers, missing = [4, 3, 3], {(1, 0): 1, (2, 1): 4}
    adapter = adapt()
    groups = adapter.trainable_groups()
    sizes = [parameter.numel() for group in groups for parameter in group.parameters]
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(3, sum(sizes), generator=generator)
    schedules = [Schedule(config, 0, number) for number in numbers]
    gradients = torch.randn(4, 3, sum(sizes), generator=generator)

    together = start.clone()
    members = BatchedOptimizer(groups, together, schedules)
    for step in range(4):
        live = sum(number > step for number in numbers)
        present = np.ones((live, len(sizes)), bool)
        given = gradients[step, :live].clone()
        for member in range(live):
            if (step, member) in missing:
                present[member, missing[step, member]] = False
                given[member].split(sizes)[missing[step, member]].zero_()
        members.step(given, step, None if present.all() else present)

    for member, number in enumerate(numbers):
        parameters = [parameter for group in groups for parameter in group.parameters]
        for parameter, value in zip(parameters, start[member].split(sizes), strict=True):
            parameter.data.copy_(value.view_as(parameter))
        single = RoundOptimizer(groups, schedules[member])
        for step in range(number):
            for index, (parameter, gradient) in enumerate(
                zip(parameters, gradients[step, member].split(sizes), strict=True)
            ):
                parameter.grad = None if missing.get((step, member)) == index else gradient.view_as(parameter).clone()
            single.step()
        expected = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
        torch.testing.assert_close(together[member], expected, rtol=1e-5, atol=1e-6)
        assert (expected - start[member]).norm() > 0.1
