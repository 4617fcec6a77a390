"""Server optimizers: the papers' formulas written out, what they degenerate to, and values that nobody holds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedray.aggregation.server_optimizer import SERVER_OPTIMIZERS, ServerOptimizer, step_where_held
from fedray.config.section import Mistakes

ROUNDS = 4


def parse(value):
    return SERVER_OPTIMIZERS.parse(value)


@pytest.fixture
def means():
    """The cohort's mean in each round, [ROUNDS, 6]; large and small changes."""
    return (np.random.default_rng(5).normal(size=(ROUNDS, 6)) * [1, 1, 0.1, 0.01, 10, 1e-4]).astype(np.float32)


def trajectory(optimizer, means):
    values, state = np.ones(6, np.float32), optimizer.init(6)
    found = []
    for mean in means:
        values, state = optimizer.step(state, values, mean)
        found.append(values)
    return np.stack(found)


def test_the_mean_is_taken_where_nothing_is_said(means):
    assert np.array_equal(trajectory(parse("sgd"), means), means)


def test_a_shorter_step(means):
    theta = 1 + 0.25 * (means[0].astype(float) - 1)
    np.testing.assert_allclose(trajectory(parse({"name": "sgd", "lr": 0.25}), means)[0], theta, rtol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_fedavgm_is_its_formula(nesterov, means):
    """Nesterov's step is Δ + β m instead of m."""
    theta, m, expected = np.ones(6), np.zeros(6), []
    for mean in means:
        m = 0.7 * m + (mean - theta)
        theta = theta + 0.5 * ((mean - theta) + 0.7 * m if nesterov else m)
        expected.append(theta)
    found = trajectory(parse({"name": "momentum", "lr": 0.5, "beta": 0.7, "nesterov": nesterov}), means)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adagrad", "adam", "yogi"])
def test_adaptive_steps_are_their_formulas(name, means):
    """Algorithm 2 of arXiv 2003.00295: no bias correction, v starts at tau squared."""
    eta, tau, beta1, beta2 = 0.3, 0.02, 0.0 if name == "adagrad" else 0.9, 0.99
    theta, m, v, expected = np.ones(6), np.zeros(6), np.full(6, tau**2), []
    for mean in means:
        delta = mean - theta
        m = beta1 * m + (1 - beta1) * delta
        if name == "adagrad":
            v = v + delta**2
        elif name == "adam":
            v = beta2 * v + (1 - beta2) * delta**2
        else:
            v = v - (1 - beta2) * delta**2 * np.sign(v - delta**2)
        theta = theta + eta * m / (np.sqrt(v) + tau)
        expected.append(theta)
    found = trajectory(parse({"name": name, "lr": eta, "tau": tau}), means)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_yogi_can_lower_v_only_slowly():
    """v far above Δ²: FedAdam forgets it in proportion to v, FedYogi in proportion to Δ²."""
    state = {"m": np.zeros(1, np.float32), "v": np.ones(1, np.float32)}
    zero, change = np.zeros(1, np.float32), np.full(1, 0.1, np.float32)
    adam = parse({"name": "adam", "lr": 1}).step(state, zero, change)[1]["v"][0]
    yogi = parse({"name": "yogi", "lr": 1}).step(state, zero, change)[1]["v"][0]
    assert adam == pytest.approx(0.99 + 0.01 * 0.01)
    assert yogi == pytest.approx(1 - 0.01 * 0.01)


@pytest.mark.parametrize(
    "option",
    [
        {"name": "momentum", "beta": 0},
        {"name": "adam", "beta1": 0, "beta2": 1, "tau": 0.1, "lr": 0.2},
        {"name": "yogi", "beta1": 0, "beta2": 1, "tau": 0.1, "lr": 0.2},
    ],
    ids=lambda option: option["name"],
)
@given(data=st.data())
def test_what_is_fedavg(option, data):
    """β = 0; β1 = 0 and β2 = 1 (so that v stays at τ²) with η = 2τ."""
    numbers = st.lists(st.floats(-100, 100, width=32), min_size=3, max_size=3)
    values, mean = (np.array(data.draw(numbers), np.float32) for _ in range(2))
    optimizer = parse(option)
    moved, _ = optimizer.step(optimizer.init(3), values, mean)
    np.testing.assert_allclose(moved, mean, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["momentum", "adagrad", "adam", "yogi"])
def test_values_that_nobody_held_stay_with_their_state(name, means):
    optimizer = parse({"name": name, "lr": 0.1})
    values, state = optimizer.step(optimizer.init(6), np.ones(6, np.float32), means[0])
    held = np.array([True, False, True, False, True, False])
    moved, after = step_where_held(optimizer, state, values, means[1], held)
    everywhere, all_after = optimizer.step(state, values, means[1])
    assert np.array_equal(moved[~held], values[~held])
    assert np.array_equal(moved[held], everywhere[held])
    assert after.keys() == state.keys() != set()
    for part in after:
        assert np.array_equal(after[part][~held], state[part][~held])
        assert np.array_equal(after[part][held], all_after[part][held])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("adma", r"unknown server optimizer 'adma' \(did you mean 'adam'\?\); allowed: adagrad, adam, momentum, sgd"),
        ("adam", "lr: missing"),
        ({"name": "adam", "lr": -1}, "lr: "),
        ({"name": "momentum", "beta": 1}, "beta: "),
        ({"name": "adam", "lr": 1, "tau": 0}, "tau: "),
        ({"name": "momentum", "betta": 0.5}, "betta: unknown key"),
    ],
)
def test_mistakes_are_named(option, message):
    with pytest.raises((ValueError, Mistakes), match=message):
        parse(option)


def test_an_own_optimizer_needs_a_step():
    with pytest.raises(TypeError, match="has no function `step`"):
        type("Nothing", (ServerOptimizer,), {})
