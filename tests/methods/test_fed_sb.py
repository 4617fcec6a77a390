"""Fed-SB: exact means of cores between common frames, frames from the mean gradient, sent once."""

from dataclasses import replace

import numpy as np
import pytest
from agreement import agree, together
from received import received
from tiny import tiny_experiment

import fedray
from fedray.adapters.draws import draw_frames
from fedray.adapters.layout import Layout, Slot
from fedray.aggregation.frames import frame
from fedray.aggregation.low_rank import LowRank, truncate
from fedray.errors import ConfigError
from fedray.methods.bases.shared_adapter import GlobalAdapter
from fedray.methods.fed_sb import FedSb, Framed, Gradient
from fedray.methods.protocol import Initial, Update
from fedray.storage.state_tree import leaves, signature_of
from fedray.types import Client

RANK = 3
SHAPES = ((9, 7), (4, 8))
FRAMES = Layout(
    tuple(
        slot
        for i, (d_out, d_in) in enumerate(SHAPES)
        for slot in (Slot(f"layer.{i}", "A", (RANK, d_in)), Slot(f"layer.{i}", "B", (d_out, RANK)))
    )
)
CORE = Layout(tuple(Slot(f"layer.{i}", "core", (RANK, RANK)) for i in range(2)))
INITIAL = Initial(
    5,
    {"core": CORE, "frames": FRAMES},
    {"core": np.zeros(CORE.size, np.float32), "frames": draw_frames(FRAMES, 5)},
)


def clients(examples, ranks=None):
    ranks = ranks or [None] * len(examples)
    return [
        Client(f"client_{i}", i, n, capacity={} if rank is None else {"lora_rank": rank})
        for i, (n, rank) in enumerate(zip(examples, ranks, strict=True))
    ]


def gradients(cohort, seed=0, rank=RANK):
    """−g_k of every client, of its rank."""
    rng = np.random.default_rng(seed)
    return [
        Update(
            client,
            client.num_examples,
            Gradient(
                tuple(
                    LowRank(*(rng.normal(size=shape).astype(np.float32) for shape in ((d_out, r), (r, d_in))))
                    for d_out, d_in in SHAPES
                    for r in [min(rank, client.capacity.get("lora_rank", RANK))]
                )
            ),
        )
        for client in cohort
    ]


def mean_gradient(updates, target):
    total = sum(update.num_examples for update in updates)
    return sum(
        update.num_examples / total * (x.B.astype(np.float64) @ x.A.astype(np.float64))
        for update in updates
        for x in [update.payload.descent[target]]
    )


def parts(server):
    """(B, R, A) of each target, read from the vectors by position."""
    found, at_core, at_frame = [], 0, 0
    for d_out, d_in in SHAPES:
        core = server.common.shared.adapter[at_core : at_core + RANK**2].reshape(RANK, RANK)
        a = server.frames[at_frame : at_frame + RANK * d_in].reshape(RANK, d_in)
        at_frame += a.size
        b = server.frames[at_frame : at_frame + RANK * d_out].reshape(d_out, RANK)
        at_core, at_frame = at_core + core.size, at_frame + b.size
        found.append(tuple(x.astype(np.float64) for x in (b, core, a)))
    return found


@pytest.mark.parametrize("ranks", [None, [1, 2, 3]])
def test_the_first_step_is_the_mean_gradients_best_approximation(ranks):
    """B R_0 A = η/σ_1 times the dense SVD of −Σ w_k g_k, cut to rank 3; the frames are orthonormal."""
    method, cohort = FedSb(step=0.5), clients([1, 2, 5], ranks)
    updates = gradients(cohort)
    server, _ = method.aggregate_train(method.init_server(INITIAL, cohort), updates)
    for target, (b, core, a) in enumerate(parts(server)):
        u, s, vt = np.linalg.svd(mean_gradient(updates, target))
        best = 0.5 / s[0] * (u[:, :RANK] * s[:RANK]) @ vt[:RANK]
        np.testing.assert_allclose(b @ core @ a, best, atol=1e-6)
        np.testing.assert_allclose(b.T @ b, np.eye(RANK), atol=1e-6)
        np.testing.assert_allclose(a @ a.T, np.eye(RANK), atol=1e-6)


def test_directions_that_the_gradients_leave_open_come_from_the_seed():
    """One client of rank 1: two components with R_0 = 0 and orthonormal frames, which another seed draws otherwise."""
    method, cohort = FedSb(), clients([4], [1])
    first, again, other = (
        method.aggregate_train(method.init_server(replace(INITIAL, seed=seed), cohort), gradients(cohort))[0]
        for seed in (5, 5, 6)
    )
    for b, core, a in parts(first):
        assert core[0, 0] == pytest.approx(0.01)
        assert np.count_nonzero(core) == 1
        np.testing.assert_allclose(b.T @ b, np.eye(RANK), atol=1e-6)
        np.testing.assert_allclose(a @ a.T, np.eye(RANK), atol=1e-6)
    assert np.array_equal(first.frames, again.frames)
    assert not np.array_equal(first.frames, other.frames)


def test_a_gradient_of_zero_leaves_the_model_as_it_is():
    method, cohort = FedSb(), clients([4])
    (update,) = gradients(cohort)
    zero = replace(update, payload=Gradient(tuple(LowRank.zeros(*shape, RANK) for shape in SHAPES)))
    server, _ = method.aggregate_train(method.init_server(INITIAL, cohort), [zero])
    assert not server.common.shared.adapter.any()
    assert np.isfinite(server.frames).all()


def test_frames_of_full_rank_represent_every_change():
    """r = d_out = d_in: R = Bᵀ ΔW Aᵀ gives B R A = ΔW."""
    rng = np.random.default_rng(1)
    draw = LowRank(*(rng.normal(size=(6, 6)).astype(np.float32) for _ in range(2)))
    x = LowRank(*(rng.normal(size=shape).astype(np.float32) for shape in ((6, 2), (2, 6))))
    frames, values = frame(truncate(x, 6), draw)
    wanted = rng.normal(size=(6, 6))
    np.testing.assert_allclose(frames.B @ (frames.B.T @ wanted @ frames.A.T) @ frames.A, wanted, atol=1e-5)
    np.testing.assert_allclose(values[:2], np.linalg.svd(x.dense())[1][:2], rtol=1e-5)
    np.testing.assert_allclose((frames.B * values) @ frames.A, x.dense(), atol=1e-5)
    assert not values[2:].any()


@pytest.mark.parametrize("ranks", [None, [1, 3, 3]])
def test_the_mean_of_cores_is_the_mean_of_products(ranks):
    """Σ w_k B R_k A = B R̄ A; with tiers a value of R counts for those who hold it, the leading blocks."""
    method, cohort = FedSb(), clients([1, 2, 5], ranks)
    server, _ = method.aggregate_train(method.init_server(INITIAL, cohort), gradients(cohort))
    rng, updates, blocks = np.random.default_rng(2), [], []
    for client in cohort:
        r = client.capacity.get("lora_rank", RANK)
        blocks.append([rng.normal(size=(r, r)).astype(np.float32) for _ in SHAPES])
        vector = np.concatenate([block.reshape(-1) for block in blocks[-1]])
        updates.append(Update(client, client.num_examples, GlobalAdapter(vector, None)))
    after, _ = method.aggregate_train(server, updates)
    for target, (b, core, a) in enumerate(parts(after)):
        total, weight = np.zeros((RANK, RANK)), np.zeros((RANK, RANK))
        for client, own in zip(cohort, blocks, strict=True):
            r = len(own[target])
            total[:r, :r] += client.num_examples * own[target]
            weight[:r, :r] += client.num_examples
        np.testing.assert_allclose(core, total / weight, atol=1e-6)
        if ranks is None:
            mean = sum(c.num_examples / 8 * b @ own[target] @ a for c, own in zip(cohort, blocks, strict=True))
            np.testing.assert_allclose(b @ core @ a, mean, atol=1e-6)
    assert np.array_equal(after.frames, server.frames)


def test_every_client_receives_the_frames_once():
    """Client 2 is absent in the rounds 0 and 1, and its frames come with its first downlink."""
    method, cohort = FedSb(), clients([1, 2, 5], [None, 2, None])
    server = method.init_server(INITIAL, cohort)
    assert all(down.frames is None for down in received(method, server, cohort[:2]).values())
    server, _ = method.aggregate_train(server, gradients(cohort[:2]))
    down = received(method, server, cohort[:2])
    assert [down[client.id].frames.size for client in cohort[:2]] == [FRAMES.size, FRAMES.size * 2 // 3]
    updates = [Update(c, c.num_examples, GlobalAdapter(down[c.id].adapter, None)) for c in cohort[:2]]
    server, _ = method.aggregate_train(server, updates)
    down = received(method, server, cohort)
    assert [down[client.id].frames is None for client in cohort] == [True, True, False]
    assert server.informed == ("client_0", "client_1")


@pytest.mark.parametrize("init", ["gradient", "random"])
def test_no_update_changes_nothing(init):
    method, cohort = FedSb(init=init), clients([1, 2])
    server = method.init_server(INITIAL, cohort)
    after, _ = method.aggregate_train(server, [])
    assert after == server or np.array_equal(after.common.shared.adapter, server.common.shared.adapter)
    assert after.frames is None
    assert after.informed == ()


def test_three_real_rounds(start):
    """Round 0 sends gradients and trains nothing; its frames and R_0 lower the mean loss; from then on R is averaged,
    and the frames never change."""
    run = start({"name": "fed_sb", "step": 0.5}, evaluation__every=1, clients__per_round=2)
    first = run.round()
    assert {result.report.steps for result in first.results} == {0}
    frames = run.server.frames
    results = run.serve()
    assert all(isinstance(result.payload, GlobalAdapter) for result in results.values())
    assert all(isinstance(result.state, Framed) for result in results.values())
    before = [result.report.train_loss for result in results.values()]
    for _ in range(2):
        sent = run.serve()
        present = [sent[result.client.id] for result in run.round().results]
        total = sum(result.num_examples for result in present)
        mean = sum(result.num_examples / total * result.payload.adapter.astype(np.float64) for result in present)
        np.testing.assert_allclose(run.server.common.shared.adapter, mean, atol=1e-6)
    assert np.array_equal(run.server.frames, frames)
    assert np.mean([result.report.train_loss for result in run.serve().values()]) < np.mean(before)


def test_the_first_step_lowers_the_loss(start):
    """W0 + B R_0 A against W0, on the clients' own training examples."""
    run = start({"name": "fed_sb", "step": 0.05}, train__lr=1e-12, train__batch_size=16)
    plain = start({"name": "fed_sb", "init": "random"}, train__lr=1e-12, train__batch_size=16)
    run.round()
    weights = [9 / 21, 5 / 21, 7 / 21]
    losses = [
        sum(w * result.report.train_loss for w, result in zip(weights, one.serve().values(), strict=True))
        for one in (run, plain)
    ]
    assert losses[0] < losses[1] - 1e-3


def test_random_frames_are_never_sent(start):
    """They are the same for all clients, and R starts at 0; clients' updates can be averaged where they arise."""
    run = start({"name": "fed_sb", "init": "random"})
    run.rounds(2)
    results = list(run.serve().values())
    held = [{name: value for name, value in r.adapter.items() if name.startswith("frames")} for r in results]
    drawn = run.initial.layouts["frames"].views(run.initial.vectors["frames"])
    for name, value in drawn.items():
        assert all(np.array_equal(one[f"frames.{name}"], value) for one in held)
    r = run.config.lora.rank
    head = run.initial.layouts["head"].size
    assert results[0].uplink_bytes == results[0].downlink_bytes == 4 * (4 * r**2 + head)
    assert run.method.averages == "examples"
    assert FedSb().averages is None


def test_one_client_gets_its_own_core_back(start):
    run = start("fed_sb", clients__count=1)
    run.round()
    (result,) = run.serve().values()
    run.round()
    np.testing.assert_allclose(run.server.common.shared.adapter, result.payload.adapter, atol=1e-7)


def test_gradients_of_clients_in_one_step_are_as_one_by_one(start):
    """Round 0 by products, since factors of close singular values differ more; then the cores."""
    run = start("fed_sb")
    tasks = run.tasks(("client_000", "client_001", "client_002"))
    for result, expected in zip(together(run.worker, tasks), map(run.worker.train, tasks), strict=True):
        for found, same in zip(result.payload.descent, expected.payload.descent, strict=True):
            np.testing.assert_allclose(found.dense(), same.dense(), atol=1e-5 * np.abs(same.dense()).max())
    run.round()
    tasks = run.tasks(("client_000", "client_001", "client_002"), measure=True)
    agree(together(run.worker, tasks), [run.worker.train(task) for task in tasks])


def test_plan_counts_both_rounds(start):
    """The shapes of the gradients and of the cores; the numbers are the second round's, in which the frames go down."""
    run = start("fed_sb", clients__count=2)
    planned = run.prepared.costs["fed_sb"]["default"]
    for _ in range(2):
        results = run.serve().values()
        assert all(signature_of(leaves(result.payload)) in planned.shapes for result in results)
        run.round()
    assert {(r.uplink_bytes, r.downlink_bytes) for r in results} == {(planned.uplink_bytes, planned.downlink_bytes)}
    sizes = {name: layout.size for name, layout in run.initial.layouts.items()}
    assert planned.trainable == planned.uplink == sizes["core"] + sizes["head"]
    assert planned.downlink == planned.uplink + sizes["frames"]


def test_a_resumed_run_has_equal_bits(tmp_path):
    config = tiny_experiment() | {"method": "fed_sb", "runtime": "inline", "device": "cpu", "rounds": 3}
    whole = fedray.run(config, output=tmp_path / "whole").summaries[0].state_sha256
    fedray.run(config | {"rounds": 1}, output=tmp_path / "run")
    assert fedray.run(config, resume=tmp_path / "run").summaries[0].state_sha256 == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter": "lora"}, "fed_sb.adapter: lora has no core"),
        ({"step": 0}, "step: got 0: Input should be greater than 0"),
        ({"init_examples": -1}, "init_examples: got"),
        ({"init": "random", "step": 0.2}, "fed_sb|fedsb.*step: has no effect without init: gradient"),
    ],
)
def test_bad_options_are_refused(start, options, message):
    with pytest.raises(ConfigError, match=message):
        start({"name": "fed_sb", **options})


def test_a_rank_above_a_targets_width_is_refused(start):
    with pytest.raises(ConfigError, match=r"lora.rank: 17"):
        start("fed_sb", lora__rank=17)
