"""FedReFT: what comes from everybody else, and how much of it a client takes over."""

import numpy as np
import pytest
from received import received
from scipy.linalg import orthogonal_procrustes, polar
from scipy.optimize import minimize

from fedray.config import ReftSection, load_config
from fedray.errors import ConfigError, TrainingError
from fedray.methods.fedreft import AllButMe, ClientState, FedReft, SharedPart
from fedray.methods.registry import build_method

PHI = 2 * 2 * (2 * 2 * 5 + 2)
"""Numbers of the fixture `paper`'s φ: two layers of prefix and suffix with R and W of [2, 5] and b of [2]."""


@pytest.fixture
def method(request):
    """FedReFT of the options given by `parametrize("method", [...], indirect=True)`."""
    return FedReft(ReftSection(rank=2), **getattr(request, "param", {}))


@pytest.fixture
def served(paper, clients, updates):
    """served(method, phis): the server after the first clients sent these φ."""

    def serve(method, phis):
        payloads = [SharedPart(np.asarray(phi, np.float32), None) for phi in phis]
        server = method.init_server(paper, clients)
        return method.aggregate_train(server, updates(clients[: len(phis)], payloads))[0]

    return serve


def geometric_median(points):
    """By a general-purpose optimiser, from the mean."""
    points = np.asarray(points, np.float64)
    return minimize(
        lambda x: np.linalg.norm(x - points, axis=1).sum(),
        points.mean(axis=0),
        jac=lambda x: ((x - points) / np.linalg.norm(x - points, axis=1, keepdims=True)).sum(axis=0),
        options={"gtol": 1e-9},
    ).x


@pytest.mark.parametrize("method", [{"aggregate": "mean"}, {"aggregate": "geometric_median"}], indirect=True)
def test_all_but_me_against_a_loop_over_clients(method, served, clients, spread):
    phis = spread(5, PHI)
    down = received(method, served(method, phis), clients)
    for k, client in enumerate(clients):
        others = np.array([phi for j, phi in enumerate(phis) if j != k])
        expected = others.mean(axis=0) if method.aggregate == "mean" else geometric_median(others)
        np.testing.assert_allclose(down[client.id].others, expected, atol=1e-5)


def test_the_median_of_three_clients_is_the_mean_and_of_five_is_not(served, clients, spread):
    mean, median = (FedReft(ReftSection(), aggregate=name) for name in ("mean", "geometric_median"))
    for count in (3, 5):
        phis = spread(count, PHI)
        one, other = (received(m, served(m, phis), clients[:count]) for m in (mean, median))
        difference = max(np.abs(one[client.id].others - other[client.id].others).max() for client in clients[:count])
        assert (difference == 0) if count == 3 else (difference > 0.01)


@pytest.mark.parametrize("share", ["full", "rotation"])
def test_granularity_layer_takes_one_median_per_layer_of_prefix_and_suffix(served, clients, spread, share):
    """What is shared of each layer lies in one half of the vector."""
    layer, whole = (FedReft(ReftSection(), share=share, granularity=name) for name in ("layer", "all"))
    size = {"full": PHI, "rotation": 2 * 2 * 10}[share]
    phis = spread(5, size)
    down = received(layer, served(layer, phis), clients)["a"].others
    halves = [geometric_median(phis[1:, : size // 2]), geometric_median(phis[1:, size // 2 :])]
    np.testing.assert_allclose(down, np.concatenate(halves), atol=1e-5)
    assert np.abs(down - received(whole, served(whole, phis), clients)["a"].others).max() > 1e-3


@pytest.mark.parametrize("method", [{"aggregate": "mean"}], indirect=True)
def test_an_absent_client_counts_with_its_latest_update_and_one_that_never_trained_not_at_all(
    method, paper, clients, spread, updates
):
    """a, b and c train in round 0, a alone in round 1, d and e never."""
    a0, b0, c0, a1 = spread(4, PHI)
    server = method.init_server(paper, clients)
    assert all(down.others is None for down in received(method, server, clients).values())
    server, _ = method.aggregate_train(server, updates(clients[:3], [SharedPart(phi, None) for phi in (a0, b0, c0)]))
    server, _ = method.aggregate_train(server, updates(clients[:1], [SharedPart(a1, None)]))
    down = received(method, server, clients)
    for id, others in {"a": [b0, c0], "b": [a1, c0], "c": [a1, b0], "d": [a1, b0, c0], "e": [a1, b0, c0]}.items():
        np.testing.assert_allclose(down[id].others, sum(others) / len(others), atol=1e-6)


@pytest.mark.parametrize("method", [{"aggregate": "mean"}], indirect=True)
def test_mean_all_but_me_is_fedavg_with_oneself_taken_out(method, served, clients, spread):
    """With m the uniform FedAvg of the same φ, φ_{-k} = (K m − φ_k)/(K − 1): K different models around the one model m,
    which is their mean. Client k's own φ has weight 0 in what it gets, 1/K under FedAvg."""
    phis = spread(5, PHI)
    m = phis.mean(axis=0)
    down = received(method, served(method, phis), clients)
    for client, phi in zip(clients, phis, strict=True):
        np.testing.assert_allclose(down[client.id].others, (5 * m - phi) / 4, atol=1e-5)
    np.testing.assert_allclose(np.mean([d.others for d in down.values()], axis=0), m, atol=1e-5)
    assert len({d.others.tobytes() for d in down.values()}) == 5


def train_once(method, paper, clients, vector_adapter, fake_local, phi, others, **options):
    """Train client a once; return what went up, what stayed, and its side of the round."""
    adapter = vector_adapter(paper)
    local = fake_local(clients[0], adapter, **options)
    sent, own = method.train_client(adapter, ClientState(phi, None), AllButMe(others, paper.head()), local)
    return sent, own, local


@pytest.mark.parametrize("method", [{"mixing": "fixed", "lam": lam} for lam in (0.0, 0.25, 1.0)], indirect=True)
def test_a_fixed_lambda_mixes(method, paper, clients, vector_adapter, fake_local, spread):
    """φ ← (1 − λ) φ + λ φ_{-k}: at 0 nothing of the others, at 1 nothing else, bit for bit; nothing is evaluated."""
    phi, others = spread(2, PHI)
    sent, own, local = train_once(method, paper, clients, vector_adapter, fake_local, phi, others)
    expected = {0.0: phi, 1.0: others}.get(method.lam, 0.75 * phi + 0.25 * others)
    assert np.array_equal(own.phi, expected)
    assert np.array_equal(sent.phi, expected)
    assert (local.recorded["lam"], local.evaluated) == (method.lam, [])


def distance_to(target):
    return lambda adapter: float(((adapter.read("reft") - target) ** 2).sum())


@pytest.mark.parametrize(
    ("candidates", "loss", "chosen"),
    [
        ((0.0, 0.25, 0.5, 0.75, 1.0), distance_to(0.6), 0.5),
        ((0.0, 0.25, 0.5, 0.75, 1.0), distance_to(0.625), 0.5),  # 0.5 and 0.75 are equally far
        ((1.0, 0.75, 0.0), distance_to(0.875), 0.75),  # 0.75 and 1 are, and 1 comes first
        ((0.0, 0.5, 1.0), distance_to(2.0), 1.0),
        ((0.0, 0.5, 1.0), lambda adapter: 3.0, 0.0),
        ((0.5, 1.0), distance_to(0.0), 0.5),
    ],
)
def test_the_adaptive_lambda_has_the_lowest_validation_loss(
    paper, clients, vector_adapter, fake_local, candidates, loss, chosen
):
    """φ is 0 and φ_{-k} is 1 throughout, so that the mixture is λ, and the loss its squared distance from a target."""
    method = FedReft(ReftSection(rank=2), candidates=candidates)
    zeros, ones = np.zeros(PHI, np.float32), np.ones(PHI, np.float32)
    _, own, local = train_once(method, paper, clients, vector_adapter, fake_local, zeros, ones, loss=loss)
    assert local.recorded["lam"] == chosen
    assert np.array_equal(own.phi, np.full(PHI, chosen, np.float32))
    assert local.evaluated == ["validation"] * len(candidates)


def test_lambda_is_chosen_before_training(method, paper, clients, vector_adapter, fake_local):
    """Training moves φ by 10 from the chosen mixture, after all candidates were evaluated."""
    zeros, ones = np.zeros(PHI, np.float32), np.ones(PHI, np.float32)

    def training(adapter):
        adapter.load("reft", adapter.read("reft") + 10)

    sent, own, local = train_once(
        method, paper, clients, vector_adapter, fake_local, zeros, ones, loss=distance_to(0.25), training=training
    )
    assert local.recorded["lam"] == 0.25
    assert np.array_equal(own.phi, np.full(PHI, 10.25, np.float32))
    assert np.array_equal(sent.phi, own.phi)


def test_without_others_a_client_keeps_its_own(method, paper, clients, vector_adapter, fake_local, spread):
    (phi,) = spread(1, PHI)
    _, own, local = train_once(method, paper, clients, vector_adapter, fake_local, phi, None, loss=distance_to(0))
    assert np.array_equal(own.phi, phi)
    assert (local.recorded["lam"], local.evaluated) == (0.0, [])


def test_without_validation_examples_no_lambda_can_be_chosen(
    method, paper, clients, vector_adapter, fake_local, spread
):
    phi, others = spread(2, PHI)
    with pytest.raises(TrainingError, match="'a' has no validation examples.*validation_fraction.*fixed"):
        train_once(method, paper, clients, vector_adapter, fake_local, phi, others, num_validation=0)


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        ({"mixing": "fixed", "lam": 1.0, "share": "full"}, {"R", "W", "b"}),
        ({"mixing": "fixed", "lam": 1.0, "share": "rotation"}, {"R"}),
        ({"mixing": "fixed", "lam": 1.0, "share": "source"}, {"W", "b"}),
    ],
    indirect=["method"],
)
def test_what_is_not_shared_stays_local(method, paper, clients, vector_adapter, fake_local, spread, parts):
    """With λ = 1 every shared number is the others' and every other one the client's own; only the former travel."""
    numbers = {"R": 10, "W": 10, "b": 2}
    size = 4 * sum(numbers[part] for part in parts)
    (phi,), (others,) = spread(1, PHI), spread(1, size)
    sent, own, _ = train_once(method, paper, clients, vector_adapter, fake_local, phi, others)
    before, after = (paper.layouts["reft"].items(vector) for vector in (phi, own.phi))
    taken = []
    for (slot, old), (_, new) in zip(before, after, strict=True):
        if slot.part in parts:
            taken.append(new.reshape(-1))
        else:
            assert np.array_equal(old, new)
    assert np.array_equal(np.concatenate(taken), others)
    assert np.array_equal(sent.phi, others)


def rotated(layout, phi, rng):
    """(QR, QW, Qb) with an orthogonal Q of each intervention's own: the same function by other numbers."""
    copy = phi.copy()
    rotation = {slot.module: np.linalg.qr(rng.normal(size=(2, 2)))[0] for slot in layout.slots}
    for slot, view in layout.items(copy):
        view[...] = rotation[slot.module] @ view
    return copy


def edits(layout, phi, h):
    """h + Rᵀ(W h + b − R h) of every intervention, with R as the adapter would load it: its polar factor."""
    views = layout.views(phi)
    result = []
    for module in dict.fromkeys(slot.module for slot in layout.slots):
        r, w, b = (views[f"{module}.{part}"].astype(np.float64) for part in "RWb")
        r = polar(r)[0]
        result.append(h + (h @ w.T + b - h @ r.T) @ r)
    return np.array(result)


@pytest.fixture
def gauge(paper, spread):
    """Five copies of one LoReFT φ (R orthonormal) that differ by rotations alone."""
    layout, rng = paper.layouts["reft"], np.random.default_rng(5)
    (phi,) = spread(1, PHI)
    for slot, view in layout.items(phi):
        if slot.part == "R":
            view[...] = polar(view)[0]
    return layout, np.array([rotated(layout, phi, rng) for _ in range(5)])


@pytest.mark.parametrize("aggregate", ["mean", "geometric_median"])
def test_aligned_copies_of_one_function_aggregate_to_it(served, clients, gauge, aggregate, spread):
    """All five clients have the same function. Aligned, the others of k aggregate to φ_k itself; taken as they are,
    to another function, and to matrices R far from orthonormal."""
    layout, phis = gauge
    h = spread(9, 5).astype(np.float64)
    np.testing.assert_allclose(edits(layout, phis[0], h), edits(layout, phis[1], h), atol=1e-5)
    aligned, plain = (FedReft(ReftSection(), aggregate=aggregate, align=align) for align in ("procrustes", "none"))
    found = received(aligned, served(aligned, phis), clients)
    as_they_are = received(plain, served(plain, phis), clients)
    for client, phi in zip(clients, phis, strict=True):
        np.testing.assert_allclose(found[client.id].others, phi, atol=1e-5)
        assert np.abs(edits(layout, as_they_are[client.id].others, h) - edits(layout, phi, h)).max() > 0.3


@pytest.mark.parametrize(("share", "parts"), [("rotation", {"R"}), ("source", {"W", "b"})])
def test_alignment_with_what_is_shared_alone(served, clients, gauge, share, parts):
    layout, phis = gauge
    method = FedReft(ReftSection(), share=share, align="procrustes")
    shared = phis[:, layout.mask(parts)]
    found = received(method, served(method, shared), clients)
    for client, phi in zip(clients, shared, strict=True):
        np.testing.assert_allclose(found[client.id].others, phi, atol=1e-5)


@pytest.mark.parametrize("method", [{"align": "procrustes", "aggregate": "mean"}], indirect=True)
def test_a_client_that_never_trained_is_aligned_with_the_common_initial_value(method, paper, served, clients, gauge):
    """a, b and c hold copies of what all started from; e has not trained, so its φ is that start."""
    _, phis = gauge
    paper.vectors["reft"][:] = phis[0]
    down = received(method, served(method, phis[1:4]), clients)
    np.testing.assert_allclose(down["e"].others, phis[0], atol=1e-5)


@pytest.mark.parametrize("method", [{"align": "procrustes", "aggregate": "mean"}], indirect=True)
def test_alignment_of_different_clients_is_procrustes(method, paper, served, clients, spread):
    """Per intervention the orthogonal Q with the least ‖Q [R|W|b]_j − [R|W|b]_k‖, by scipy, for clients with nothing in
    common."""
    layout, phis = paper.layouts["reft"], spread(4, PHI)
    down = received(method, served(method, phis), clients[:4])

    def stacked(phi, module):
        return np.concatenate([layout.views(phi)[f"{module}.{part}"].reshape(2, -1) for part in "RWb"], axis=1)

    for module in {slot.module for slot in layout.slots}:
        mine = stacked(phis[2], module)
        others = [stacked(phis[j], module) for j in (0, 1, 3)]
        fitted = [(other.T @ orthogonal_procrustes(other.T, mine.T)[0]).T for other in others]
        np.testing.assert_allclose(stacked(down["c"].others, module), sum(fitted) / 3, atol=1e-5)


@pytest.mark.parametrize("method", [{"head": "shared"}], indirect=True)
def test_a_shared_head_is_the_mean_weighted_by_examples(method, paper, clients, spread, updates):
    """b has 2 examples and d 4: (2 h_b + 4 h_d)/6; clients that are absent do not count."""
    heads, phis = spread(5, 3), spread(5, PHI)
    server = method.init_server(paper, clients)
    assert np.array_equal(server.head, paper.head())
    payloads = [SharedPart(phi, head) for phi, head in zip(phis, heads, strict=True)]
    server, _ = method.aggregate_train(server, updates([clients[1], clients[3]], [payloads[1], payloads[3]]))
    np.testing.assert_allclose(server.head, (2 * heads[1] + 4 * heads[3]) / 6, atol=1e-6)
    assert all(down.head is server.head for down in received(method, server, clients).values())


@pytest.mark.parametrize("head", ["shared", "local"])
def test_every_client_starts_from_the_head_that_is_its_own_or_the_servers(
    paper, clients, vector_adapter, fake_local, spread, head
):
    method = FedReft(ReftSection(rank=2), head=head)
    own, common = spread(2, 3)
    adapter, seen = vector_adapter(paper), []
    local = fake_local(clients[0], adapter, lambda a: (seen.append(a.read("head")), a.load("head", a.read("head") + 1)))
    down = AllButMe(None, common if head == "shared" else None)
    sent, after = method.train_client(
        adapter, ClientState(paper.vectors["reft"], own if head == "local" else None), down, local
    )
    assert np.array_equal(seen[0], common if head == "shared" else own)
    travels, stays = (sent.head, after.head) if head == "shared" else (after.head, sent.head)
    assert np.array_equal(travels, seen[0] + 1)
    assert stays is None


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"lam": 1.5}, "lam.*1.5"),
        ({"candidates": [0.5, -0.1]}, "candidates.*-0.1"),
        ({"candidates": []}, "candidates"),
        ({"smoothing": -1}, "smoothing >= 0.*-1"),
        ({"tolerance": 0}, "tolerance > 0"),
        ({"max_iterations": 0}, "max_iterations >= 1"),
    ],
)
def test_values_out_of_range_are_refused_before_anything_runs(options, complaint):
    config = load_config(
        {
            "rounds": 1,
            "method": {"name": "fedreft", **options},
            "model": {"path": "package:none"},
            "data": {"source": "synthetic"},
        }
    )
    with pytest.raises(ConfigError, match=complaint):
        build_method(config, config.method[0])
