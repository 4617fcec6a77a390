"""The optimizer against update formulas written out one value at a time."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from fedray.adapters.adapter import TrainableGroup
from fedray.config import TrainConfig
from fedray.training.optimizer import RoundOptimizer
from fedray.training.schedule import Schedule


def make_groups(seed=0):
    """The adapter's weights, a raw rotation without decay, and the head; in numpy, too."""
    rng = np.random.default_rng(seed)
    values = [rng.normal(size=shape) for shape in [(3, 2), (4,), (2, 2)]]
    parameters = [nn.Parameter(torch.tensor(value, dtype=torch.float32)) for value in values]
    groups = [
        TrainableGroup("reft", (parameters[0],), True),
        TrainableGroup("reft", (parameters[1],), False),
        TrainableGroup("head", (parameters[2],), True),
    ]
    return groups, parameters, values


def gradients(steps, seed=1):
    rng = np.random.default_rng(seed)
    return [
        [rng.normal(size=shape) * 10 ** rng.uniform(-2, 1) for shape in [(3, 2), (4,), (2, 2)]] for _ in range(steps)
    ]


def run(train, steps, server_round=0):
    groups, parameters, _ = make_groups()
    optimizer = RoundOptimizer(groups, Schedule(train, server_round, steps))
    for step in gradients(steps):
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = torch.tensor(gradient, dtype=torch.float32)
        optimizer.step()
    return [parameter.detach().numpy() for parameter in parameters]


def clipped(step, largest):
    norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in step))
    return [gradient * min(1.0, largest / norm) for gradient in step]


def rates(train, step, steps, server_round):
    factor = train.round_decay**server_round * ((steps - step) / steps if train.schedule == "linear" else 1.0)
    return [train.lr * factor, train.lr * factor, train.head_lr * factor]


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_adamw_is_its_formula(schedule):
    """m = β₁m + (1-β₁)g, v = β₂v + (1-β₂)g², θ ← θ(1 - lr·wd) - lr · m̂ / (√v̂ + ε), in float64."""
    train = TrainConfig(
        lr=0.02,
        head_lr=0.05,
        weight_decay=0.1,
        betas=(0.8, 0.95),
        eps=1e-3,
        clip=2.0,
        schedule=schedule,
        round_decay=0.9,
    )
    _, _, theta = make_groups()
    m, v = ([np.zeros_like(value) for value in theta] for _ in range(2))
    for t, step in enumerate(gradients(6)):
        for i, (g, lr) in enumerate(zip(clipped(step, 2.0), rates(train, t, 6, 2), strict=True)):
            m[i] = 0.8 * m[i] + 0.2 * g
            v[i] = 0.95 * v[i] + 0.05 * g**2
            decayed = theta[i] * (1 - lr * (0.0 if i == 1 else 0.1))
            theta[i] = decayed - lr * (m[i] / (1 - 0.8 ** (t + 1))) / (np.sqrt(v[i] / (1 - 0.95 ** (t + 1))) + 1e-3)
    for ours, expected in zip(run(train, 6, server_round=2), theta, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_its_formula_with_decoupled_decay(momentum):
    """u = μu + g, θ ← θ(1 - lr·wd) - lr·u; the decay is not part of the momentum."""
    train = TrainConfig(
        optimizer="sgd", lr=0.02, head_lr=0.05, weight_decay=0.5, momentum=momentum, clip=None, schedule="linear"
    )
    _, _, theta = make_groups()
    u = [np.zeros_like(value) for value in theta]
    for t, step in enumerate(gradients(6)):
        for i, (g, lr) in enumerate(zip(step, rates(train, t, 6, 0), strict=True)):
            u[i] = momentum * u[i] + g
            theta[i] = theta[i] * (1 - lr * (0.0 if i == 1 else 0.5)) - lr * u[i]
    for ours, expected in zip(run(train, 6), theta, strict=True):
        np.testing.assert_allclose(ours, expected, atol=2e-6)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_without_gradient_only_decaying_groups_shrink(kind):
    """One step of lr 0.1 and decay 0.5 multiplies by 0.95; the raw rotation keeps its bits."""
    groups, parameters, _ = make_groups()
    before = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    RoundOptimizer(groups, Schedule(TrainConfig(optimizer=kind, lr=0.1, weight_decay=0.5), 0, 1)).step()
    torch.testing.assert_close(parameters[0].detach(), before[0] * 0.95)
    assert torch.equal(parameters[1].detach(), before[1])
    torch.testing.assert_close(parameters[2].detach(), before[2] * 0.95)


def test_gradients_are_gone_after_a_step():
    groups, parameters, _ = make_groups()
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    RoundOptimizer(groups, Schedule(TrainConfig(), 0, 1)).step()
    assert all(parameter.grad is None for parameter in parameters)


def test_a_parameter_without_gradient_stays():
    groups, parameters, _ = make_groups()
    before = parameters[2].detach().clone()
    parameters[0].grad = torch.ones_like(parameters[0])
    RoundOptimizer(groups, Schedule(TrainConfig(lr=0.1), 0, 1)).step()
    assert torch.equal(parameters[2].detach(), before)
