"""SCAFFOLD: its control variates against the paper's formulas, and where it is FedAvg."""

import numpy as np
import pytest
from lora_clients import INITIAL, LAYOUT, LORA, cohort

from fedray.aggregation.server_optimizers.sgd import Sgd
from fedray.errors import ConfigError
from fedray.methods.parts.capacity import own_layout
from fedray.methods.protocol import TierMean, Update
from fedray.methods.scaffold import Controlled, Scaffold

IDS = ("client_000", "client_001", "client_002")
UNIFORM = {"name": "fedavg", "weights": "uniform"}
SGD = {
    "train__optimizer": "sgd",
    "train__lr": 0.1,
    "train__weight_decay": 0,
    "train__schedule": "constant",
    "train__clip": None,
    "train__batch_size": 2,
    "lora__dropout": 0.0,
}


def vector(values):
    return np.concatenate([values.adapter, values.head])


def test_the_first_round_is_uniform_fedavg(start):
    """All control variates are zero; in the second round they are not."""
    plain, run = start(UNIFORM), start("scaffold")
    plain.round()
    run.round()
    assert np.array_equal(vector(run.server.shared), vector(plain.server.shared))
    plain.round()
    run.round()
    assert not np.array_equal(vector(run.server.shared), vector(plain.server.shared))


def test_under_plain_sgd_the_mean_gradient_is_option_two(start):
    """c_k⁺ = c_k − c + (θ − θ_k) / (steps · η), with 5, 3 and 4 steps, also in rounds with control variates."""
    run = start("scaffold", **SGD)
    for server_round in range(3):
        theta, c, states = vector(run.server.shared), vector(run.server.control), run.states()
        for id, result in run.serve().items():
            c_k = vector(states[id].control) if states else 0 * c
            expected = c_k - c + (theta - vector(result.payload)) / (result.report.steps * 0.1)
            found = vector(result.state.control)
            assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)
            np.testing.assert_allclose(vector(result.payload.control), found - c_k, atol=1e-7)
            assert server_round == 0 or np.linalg.norm(c_k - c) > 1e-3
        run.round()


def test_if_all_take_part_c_is_the_mean_of_theirs(start):
    run = start("scaffold")
    for _ in range(3):
        run.round()
        mean = sum(vector(run.state(id).control).astype(float) for id in IDS) / 3
        np.testing.assert_allclose(vector(run.server.control), mean, atol=1e-6)
        assert np.abs(mean).max() > 1e-3


def test_if_all_take_one_step_the_variates_cancel_out(start):
    """mean (g_k − c_k + c) = mean g_k."""
    plain, run = (start(method, **{**SGD, "train__max_steps": 1}) for method in (UNIFORM, "scaffold"))
    for _ in range(3):
        plain.round()
        run.round()
        np.testing.assert_allclose(vector(run.server.shared), vector(plain.server.shared), atol=1e-6)
    assert np.abs(vector(run.server.control)).max() > 1e-3


def test_absent_clients_count_in_the_share_of_the_cohort(start):
    """c ← c + 2/3 · mean of the two that take part; an absent client keeps c_k."""
    run = start("scaffold", clients__per_round=2)
    for _ in range(4):
        c, before = vector(run.server.control).astype(float), run.states()
        present = {result.client.id for result in run.round().results}
        after = run.states()
        old = {id: vector(before[id].control) if id in before else 0 * c for id in present}
        change = sum(vector(after[id].control) - old[id] for id in present) / 2
        np.testing.assert_allclose(vector(run.server.control), c + 2 / 3 * change, atol=1e-6)
        for id in before.keys() - present:
            assert np.array_equal(vector(after[id].control), vector(before[id].control))


def controlled(updates, seed):
    """The updates, with drawn changes of the control variates."""
    others = cohort(seed, [u.num_examples for u in updates], [u.capacity.get("lora_rank") for u in updates])
    return [
        Update(u.client, u.num_examples, Controlled(u.payload.adapter, u.payload.head, other.payload))
        for u, other in zip(updates, others, strict=True)
    ]


def in_place(update, values):
    """The values in the common layout, NaN where the client holds nothing."""
    found = np.full(LAYOUT.size, np.nan)
    views = LAYOUT.views(found)
    for slot, part in own_layout(LAYOUT, update.capacity).items(values):
        views[slot.name][tuple(slice(size) for size in slot.shape)] = part
    return found


def test_a_round_of_tiers_by_hand():
    """Ranks 3, 2, 3 and 2; the second and the third client take part. Components 1 and 2 have two senders of four
    holders, component 3 one of two."""
    method = Scaffold(adapter=LORA)
    everybody = cohort(1, (9, 5, 7, 2), (None, 2, None, 2))
    server = method.init_server(INITIAL, [update.client for update in everybody])
    updates = controlled(everybody[1:3], 2)
    after, _ = method.aggregate_train(server, updates)
    changes = np.stack([in_place(update, update.payload.control.adapter) for update in updates])
    values = np.stack([in_place(update, update.payload.adapter) for update in updates])
    holders = np.where(np.isnan(changes[0]), 2, 4)
    np.testing.assert_allclose(after.control.adapter, np.nansum(changes, 0) / holders, atol=1e-6)
    np.testing.assert_allclose(after.shared.adapter, np.nanmean(values, 0), atol=1e-6)
    head = sum(update.payload.control.head for update in updates) / 4
    np.testing.assert_allclose(after.control.head, head, atol=1e-6)
    means = [TierMean(str(i), u.capacity, u.num_examples, 1, u.payload) for i, u in enumerate(updates)]
    again, _ = method.aggregate_train(server, means)
    assert np.array_equal(vector(again.control), vector(after.control))
    still, _ = method.aggregate_train(after, [])
    assert np.array_equal(vector(still.control), vector(after.control))


def test_a_tiers_mean_counts_for_its_clients():
    """Two clients of three whose mean is m: c moves by 2/3 m."""
    method = Scaffold(adapter=LORA)
    three = cohort(3, (1, 2, 3))
    server = method.init_server(INITIAL, [update.client for update in three])
    mean = controlled(three[:1], 4)[0].payload
    after, _ = method.aggregate_train(server, [TierMean("default", {}, 3, 2, mean)])
    np.testing.assert_allclose(vector(after.control), 2 / 3 * vector(mean.control), atol=1e-6)
    np.testing.assert_allclose(vector(after.shared), vector(mean), atol=1e-6)


def test_the_servers_rate_is_its_optimizers():
    """η_g = 0.5 goes half the way; c moves as ever."""
    three = cohort(5, (1, 2, 3))
    clients, updates = [update.client for update in three], controlled(three, 6)
    methods = (Scaffold(adapter=LORA, server_optimizer=Sgd(lr=lr)) for lr in (1.0, 0.5))
    full, half = (method.aggregate_train(method.init_server(INITIAL, clients), updates)[0] for method in methods)
    first = INITIAL.vectors["lora"]
    np.testing.assert_allclose(half.shared.adapter, first + (full.shared.adapter - first) / 2, atol=1e-6)
    assert np.array_equal(vector(half.control), vector(full.control))


def test_a_private_head_has_no_variates(start):
    run = start("scaffold", head="local")
    run.rounds(2)
    assert run.server.control.head is None
    assert run.state(IDS[0]).control.head is None
    size = run.initial.layouts["lora"].size
    assert all(result.uplink_bytes == result.downlink_bytes == 8 * size for result in run.round().results)


def test_twice_the_numbers_travel(start):
    run = start("scaffold")
    size = run.initial.layouts["lora"].size + run.initial.layouts["head"].size
    assert all(result.uplink_bytes == result.downlink_bytes == 8 * size for result in run.round().results)


def test_states_start_at_zero(paper, clients):
    method = Scaffold()
    server, state = method.init_server(paper, clients), method.init_client(paper, clients[0])
    assert not vector(server.control).any()
    assert vector(state.control).shape == vector(server.control).shape
    assert not vector(state.control).any()
    assert server.population == ((paper.layouts["lora"], 5),)


def test_what_cannot_be_is_refused(start):
    with pytest.raises(ConfigError, match=r"'scaffold': weights: got 'examples': Input should be 'uniform'"):
        start({"name": "scaffold", "weights": "examples"})
    with pytest.raises(ConfigError, match=r"scaffold\.mask: rows that are left out would have no control variates"):
        start({"name": "scaffold", "mask": "energy"})
    with pytest.raises(ConfigError, match=r"'scaffold': train\((steering|mean_gradient)=.*is a rotation"):
        start({"name": "scaffold", "adapter": "reft"})
