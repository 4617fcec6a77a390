"""HetLoRA: means weighted by norms, ranks that shrink, and a penalty on the last components."""

from dataclasses import replace

import numpy as np
import pytest
from lora_clients import INITIAL, LAYOUT, LORA, cohort, factors, mean_head, padded_means, sent, uploads
from received import received

from fedray.errors import ConfigError
from fedray.methods.hetlora import ClientState, HetLora, Pruned
from fedray.methods.parts.capacity import own_layout
from fedray.methods.parts.factors import first_components, join, split
from fedray.methods.protocol import Initial
from fedray.types import Client

TIERS = {"weak": {"clients": ["client_000", "client_002"], "lora_rank": 1}, "strong": {"clients": ["client_001"]}}


def hetlora(**options):
    return HetLora(adapter=LORA, **options)


def pruned(updates, *active):
    """The updates with all of their tier's components, or so many."""
    found = []
    for update, rank in zip(updates, active or [None] * len(updates), strict=True):
        held = update.capacity.get("lora_rank", 3) if rank is None else rank
        payload = Pruned(update.payload.adapter, update.payload.head, active_rank=held)
        found.append(replace(update, payload=payload))
    return found


def aggregated(updates, start=INITIAL, **options):
    method = hetlora(**options)
    return method.aggregate_train(method.init_server(start, []), updates)[0].shared


def own(update):
    """A client's factors, as views of what it sends."""
    return split(own_layout(LAYOUT, update.capacity), update.payload.adapter)


def scale(update, *norms):
    """Scale B_k in place, so that the product has this norm in each target. A_k stays."""
    for x, norm in zip(own(update), norms, strict=True):
        x.B[...] *= norm / np.linalg.norm(x.B.astype(np.float64) @ x.A)


def test_weights_are_the_norms_of_the_products():
    """Norms 1, 2 and 5 on both targets, which is what examples 1, 2 and 5 weigh in FedAvg; ranks 1, 2 and 3, zeros
    where a client holds nothing. Heads are averaged by examples, here 4, 1 and 1."""
    updates = cohort(0, [1, 2, 5], [1, 2, None])
    for update in updates:
        scale(update, update.num_examples, update.num_examples)
    counted = [replace(update, num_examples=n) for update, n in zip(updates, (4, 1, 1), strict=True)]
    shared = aggregated(pruned(counted))
    for (a, b), (mean_a, mean_b) in zip(factors(LAYOUT, shared.adapter), padded_means(updates), strict=True):
        np.testing.assert_allclose(a, mean_a, atol=1e-6)
        np.testing.assert_allclose(b, mean_b, atol=1e-6)
    np.testing.assert_allclose(shared.head, mean_head(counted), atol=1e-6)


def test_weights_are_each_targets_own():
    """Norms 1 and 3 in the first target, 3 and 1 in the second: ¼ and ¾, then ¾ and ¼."""
    updates = cohort(1, [1, 1])
    scale(updates[0], 1, 3)
    scale(updates[1], 3, 1)
    found = factors(LAYOUT, aggregated(pruned(updates)).adapter)
    for (a, b), target, share in zip(found, sent(updates), (0.25, 0.75), strict=True):
        (a_0, b_0), (a_1, b_1) = target
        np.testing.assert_allclose(a, share * a_0 + (1 - share) * a_1, atol=1e-6)
        np.testing.assert_allclose(b, share * b_0 + (1 - share) * b_1, atol=1e-6)


def test_held_components_are_averaged_over_their_holders():
    """Ranks 1 and 2 of 3, norms 1 and 3: component 0 is ¼ and ¾, component 1 the second client's alone, and component
    2, which nobody holds, stays the server's. The second client then prunes to 1, and component 1 stays, too."""
    updates = cohort(2, [1, 1], [1, 2])
    for active, owner in ((2, 1), (1, None)):
        for x in own(updates[1]):
            x.B[:, active:], x.A[active:] = 0, 0
        scale(updates[0], 1, 1)
        scale(updates[1], 3, 3)
        found = factors(LAYOUT, aggregated(pruned(updates, 1, active), padding="held").adapter)
        old = factors(LAYOUT, INITIAL.vectors["lora"])
        for (a, b), ((a_0, b_0), (a_1, b_1)), (old_a, old_b) in zip(found, sent(updates), old, strict=True):
            np.testing.assert_allclose(a[0], 0.25 * a_0[0] + 0.75 * a_1[0], atol=1e-6)
            np.testing.assert_allclose(b[:, 0], 0.25 * b_0[:, 0] + 0.75 * b_1[:, 0], atol=1e-6)
            np.testing.assert_allclose(a[1], old_a[1] if owner is None else a_1[1], atol=1e-6)
            np.testing.assert_allclose(b[:, 1], old_b[:, 1] if owner is None else b_1[:, 1], atol=1e-6)
            np.testing.assert_allclose(a[2], old_a[2])
            np.testing.assert_allclose(b[:, 2], old_b[:, 2])


@pytest.mark.parametrize("padding", ["zeros", "held"])
def test_equal_norms_are_uniform_fedit_and_zero_ones_too(padding):
    """As in round 0 with a rate of zero: all B_k are 0, and the A_k are averaged."""
    updates = [replace(update, num_examples=1) for update in cohort(3, [1, 2, 5])]
    for norm in (2, 0):
        for update in updates:
            scale(update, norm, norm)
        found = factors(LAYOUT, aggregated(pruned(updates), padding=padding).adapter)
        for (a, b), (mean_a, mean_b) in zip(found, padded_means(updates), strict=True):
            np.testing.assert_allclose(a, mean_a, atol=1e-6)
            np.testing.assert_allclose(b, mean_b, atol=1e-6)


def test_one_client_or_equal_ones_get_their_factors_back():
    (update,) = cohort(4, [4])
    for updates in ([update], [replace(update, client=replace(update.client, id=id)) for id in "abc"]):
        np.testing.assert_allclose(aggregated(pruned(updates)).adapter, update.payload.adapter, atol=1e-6)


def test_no_update_changes_nothing():
    method = hetlora()
    server, _ = method.aggregate_train(method.init_server(INITIAL, []), pruned(cohort(5, [1, 2])))
    assert method.aggregate_train(server, [])[0] is server


@pytest.mark.parametrize(
    ("options", "factor", "active", "ranks"),
    [
        ({"gamma": 0.7}, 0.99, 3, [2, 1, 1]),  # m = ⌊0.7 · 3⌋ = 2, then ⌊0.7 · 2⌋ = 1, then r_min
        ({"gamma": 0.7}, 1.01, 3, [3, 3, 3]),  # the tail grew
        ({"gamma": 0.7}, 1.0, 3, [3, 3, 3]),  # the tail is the received one's, and not below it
        ({"gamma": 0.7, "min_rank": 2}, 0.99, 3, [2, 2, 2]),
        ({"gamma": 0.7, "min_rank": 3}, 0.99, 2, [2, 2, 2]),  # a rank below the minimum does not grow
        ({"gamma": 1.0}, 0.99, 3, [3, 3, 3]),  # no tail
    ],
)
def test_a_rank_shrinks_where_the_tail_does(vector_adapter, fake_local, options, factor, active, ranks):
    """Training multiplies everything by a factor. What is pruned is zero in what is loaded, evaluated and sent, and
    stays zero though the server sends it again; the penalty acts on the tail of what is left."""
    method, client = hetlora(**options), Client("a", 0, 4)
    vector = np.random.default_rng(0).normal(size=LAYOUT.size).astype(np.float32)
    start = Initial(7, INITIAL.layouts, {**INITIAL.vectors, "lora": vector})
    server, state = method.init_server(start, [client]), ClientState(head=None, active_rank=active)
    assert method.init_client(start, client).active_rank == 3
    for rank in ranks:
        adapter, loaded = vector_adapter(start), []

        def training(adapter, loaded=loaded):
            loaded.append(adapter.read("lora"))
            adapter.load("lora", factor * loaded[-1])

        local = fake_local(client, adapter, training)
        payload, after = method.train_client(adapter, state, received(method, server, [client])["a"], local)
        assert np.array_equal(loaded[0], join(first_components(split(LAYOUT, vector), state.active_rank)))
        tail = int(method.gamma * state.active_rank + 1e-9)
        steering = local.calls[0]["steering"]
        if method.gamma == 1:
            assert steering is None
        else:
            assert (steering.keep, steering.weight) == (tail, 0.005)
        assert (payload.active_rank, after.active_rank, local.recorded["active_rank"]) == (rank, rank, rank)
        sent_up = join(first_components(split(LAYOUT, np.float32(factor) * loaded[0]), rank))
        assert np.array_equal(payload.adapter, sent_up)
        assert np.array_equal(adapter.read("lora"), sent_up)
        assert local.measured == 1
        state = after


def test_without_a_penalty_nothing_is_steered(vector_adapter, fake_local):
    method, adapter = hetlora(penalty=0.0), vector_adapter(INITIAL)
    local = fake_local(Client("a", 0, 4), adapter)
    down = received(method, method.init_server(INITIAL, []), [local.client])["a"]
    method.train_client(adapter, ClientState(head=None, active_rank=3), down, local)
    assert local.calls[0]["steering"] is None


def test_without_tail_and_with_equal_weights_it_is_fedavgs_client(start):
    """γ = 1, λ = 0: what the clients send in the first round is FedAvg's, bit for bit."""
    run, plain = start({"name": "hetlora", "gamma": 1.0, "penalty": 0.0}), start("fedavg")
    for found, wanted in zip(uploads(run), uploads(plain), strict=True):
        assert np.array_equal(found.payload.adapter, wanted.payload.adapter)
        assert np.array_equal(found.payload.head, wanted.payload.head)


def test_the_penalty_shrinks_the_tail(start):
    """After three rounds with a penalty, the last component's product of norms is smaller than without one."""
    norms, sgd = [], {"train__optimizer": "sgd", "train__clip": None}
    for penalty in (0.0, 0.05):
        run = start({"name": "hetlora", "gamma": 0.5, "penalty": penalty, "min_rank": 2}, **sgd)
        run.rounds(3)
        x = factors(run.server.layout, run.server.shared.adapter)
        norms.append(sum(np.linalg.norm(a[1:]) * np.linalg.norm(b[:, 1:]) for a, b in x))
    assert norms[1] < 0.9 * norms[0]


@pytest.mark.parametrize("padding", ["zeros", "held"])
def test_two_real_rounds_of_tiers(start, padding):
    """Ranks 1, 2 and 1, against the formula; component 1 is the second client's, times its weight under `zeros`."""
    run = start({"name": "hetlora", "padding": padding}, clients__tiers=TIERS)
    layout = run.server.layout
    for _ in range(2):
        updates = uploads(run)
        done = run.round()
        assert [update.payload.active_rank for update in updates] == [1, 2, 1]
        assert done.metrics == {}
        for (a, b), target in zip(factors(layout, run.server.shared.adapter), sent(updates, layout), strict=True):
            w = np.array([np.linalg.norm(b_k @ a_k) for a_k, b_k in target])
            w /= w.sum()
            np.testing.assert_allclose(a[0], sum(s * a_k[0] for s, (a_k, _) in zip(w, target, strict=True)), atol=1e-6)
            share = w[1] if padding == "zeros" else 1
            np.testing.assert_allclose(a[1], share * target[1][0][1], atol=1e-6)
            np.testing.assert_allclose(b[:, 1], share * target[1][1][:, 1], atol=1e-6)
        np.testing.assert_allclose(run.server.shared.head, mean_head(updates), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 0.0}, "hetlora.gamma: expected a number above 0 and at most 1, got 0.0"),
        ({"gamma": 1.1}, "hetlora.gamma: expected a number above 0 and at most 1, got 1.1"),
        ({"penalty": -1.0}, "hetlora.penalty: expected a number of at least 0, got -1.0"),
        ({"penalty": float("inf")}, "hetlora.penalty: expected a number of at least 0, got inf"),
        ({"min_rank": 0}, "hetlora.min_rank: expected at least 1, got 0"),
    ],
)
def test_values_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        hetlora(**options)
