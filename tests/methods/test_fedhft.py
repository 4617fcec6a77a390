"""FedHFT's rounds against a dense re-computation and numbers derived by hand, and a client's task by itself."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from received import received
from sklearn.metrics import adjusted_rand_score

from fedray.adapters.adapter import Adapter
from fedray.adapters.draws import draw_lora
from fedray.aggregation.masks import random_rows
from fedray.config import LoraSection, load_config
from fedray.experiment.prepare import prepare
from fedray.methods.fedhft import ClientState, ClusterMixture, FedHft, mask_ratio
from fedray.methods.parts.factors import join, keep_rows, split, unpack_masks
from fedray.methods.parts.wire import decode, encode
from fedray.randomness import keyed_rng
from fedray.storage.state_tree import arrays
from fedray.training.torch_engine import TorchEngine
from fedray.training.trainer import EngineBackend, LocalTrainer
from fedray.types import Client, Evaluation

WIDTH, RANK = 16, 2
TARGETS = [f"bert.encoder.layer.{block}.attention.self.{name}" for block in (0, 1) for name in ("query", "value")]


Run = Any
"""A federation whose rounds the test runs one by one: that of conftest.py."""


def plant(run: Run, memberships: Sequence[Sequence[float]]) -> None:
    """Fix every client's π."""
    pi = {c.id: np.array(row, np.float32) for c, row in zip(run.prepared.clients, memberships, strict=True)}
    run.federation.server = replace(run.server, memberships=pi)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, begin: Callable[[Any], Run]) -> Callable[..., Run]:
    """start(hyperparameters, **changes): four clients of a tiny BERT before their first round, their memberships kept
    unless the test says otherwise. `__` stands for the dot in a path."""
    base = {
        "rounds": 4,
        "seed": 3,
        "method": "fedhft",
        "model": {
            "path": "random",
            "tokenizer": "bytes",
            "config": {
                "model_type": "bert",
                "hidden_size": WIDTH,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 24,
                "max_position_embeddings": 128,
                "initializer_range": 0.2,
            },
        },
        "data": {
            "source": "synthetic",
            "classes": 3,
            "examples_per_client": 16,
            "max_length": 24,
            "cache_dir": str(tmp_path_factory.mktemp("cache")),
        },
        "partition": {"kind": "by_file"},
        "clients": {"count": 4},
        "lora": {"rank": RANK, "alpha": 4.0, "dropout": 0.1},
        # SGD: Adam would magnify the last digits in which two equal downlinks differ.
        "train": {"batch_size": 4, "max_steps": 3, "optimizer": "sgd", "lr": 10.0, "head_lr": 0.5},
        "evaluation": {"every": 0},
        "device": "cpu",
        "runtime": "inline",
    }

    def build(hyperparameters: Mapping[str, Any], **changes: Any) -> Run:
        entry = {"name": "fedhft", "warmup_rounds": 100, **hyperparameters}
        config = load_config(base, {path.replace("__", "."): value for path, value in changes.items()})
        config = load_config(config, {"method": entry})
        return begin(prepare(config))

    return build


def tiers(*ratios: float) -> dict[str, Any]:
    return {f"rho_{ratio}": {"share": 1 / len(ratios), "mask_ratio": ratio} for ratio in ratios}


# ---------------------------------------------------------------- whole rounds against dense matrices


def dense_truncation(matrix: Any, rank: int) -> tuple[Any, Any]:
    """Return factors [d_out, rank], [rank, d_in] of the best approximation, by an SVD of the dense matrix."""
    u, s, vt = np.linalg.svd(matrix)
    return (u[:, :rank] * s[:rank]).astype(np.float32), vt[:rank].astype(np.float32)


def largest_rows(importance: Any, ratio: float) -> list[int]:
    """The ⌈ρ d_out⌉ most important rows, by sorting pairs."""
    ranked = sorted(range(len(importance)), key=lambda i: (-importance[i], i))
    return sorted(ranked[: math.ceil(ratio * len(importance))])


def dense_fedhft(run: Run, pi: Any, rounds: int, downlink_rank: int, normalise: str) -> tuple[Any, Any]:
    """FedHFT (`post`, `energy`, `full`) with one dense [d_out, d_in] matrix per cluster and target, in float64: mixed
    by np.einsum, truncated by a dense SVD, masked and averaged row by row. Only local training is the project's own.

    pi: [K, J]. Returns ΔW [J][target] and the heads [J].
    """
    clusters = pi.shape[1]
    clients, adapter, training_context = (
        run.prepared.clients,
        run.adapter,
        next(iter(run.pool.workers.values())).training_context,
    )
    lora, rest = adapter.layout("lora"), adapter.layout("rest")
    W = [{target: np.zeros((WIDTH, WIDTH)) for target in TARGETS} for _ in range(clusters)]
    heads = [run.initial.vectors["head"].astype(np.float64) for _ in range(clusters)]
    for t in range(rounds):
        products, masks, sent = [], [], []
        for k, client in enumerate(clients):
            down = {}
            for target in TARGETS:
                mixed = sum(pi[k, j] * W[j][target] for j in range(clusters))
                down[f"{target}.B"], down[f"{target}.A"] = dense_truncation(mixed, downlink_rank)
            adapter.load("rest", rest.flatten(down))
            adapter.load("lora", draw_lora(lora, training_context.seed))
            adapter.load("head", sum(pi[k, j] * heads[j] for j in range(clusters)).astype(np.float32))
            work = EngineBackend(TorchEngine(adapter), training_context)
            LocalTrainer(work, run.pool.shards[client.id], client, t, training_context, measure=False).train()
            views = lora.views(adapter.read("lora"))
            U = {x: views[f"{x}.B"].astype(np.float64) @ views[f"{x}.A"].astype(np.float64) for x in TARGETS}
            products.append(U)
            masks.append({x: largest_rows((U[x] ** 2).sum(axis=1), mask_ratio(client)) for x in TARGETS})
            sent.append(adapter.read("head").astype(np.float64))
        for j in range(clusters):
            for target in TARGETS:
                for i in range(WIDTH):
                    holders = [k for k in range(len(clients)) if i in masks[k][target]]
                    norm = sum(pi[k, j] for k in holders) if normalise == "membership" else len(holders)
                    if norm > 0:
                        W[j][target][i] += sum(pi[k, j] * products[k][target][i] for k in holders) / norm
            heads[j] = sum(pi[k, j] * sent[k] for k in range(len(clients))) / pi[:, j].sum()
    return W, heads


@pytest.mark.parametrize(
    ("memberships", "normalise"),
    [
        ([[1], [1], [1], [1]], "count"),
        ([[1, 0], [0, 1], [0.75, 0.25], [0.25, 0.75]], "membership"),
        ([[1, 0], [0, 1], [0.75, 0.25], [0.25, 0.75]], "count"),
    ],
)
def test_four_rounds_are_those_of_dense_matrices(
    start: Callable[..., Run], memberships: list[list[float]], normalise: str
) -> None:
    """J = 1 is what a reviewer asks for; J = 2 has fixed memberships. Ranks: the LoRA's is 2, the downlink's 5 (below
    the 8 or more that ΔW has after the first round), and d_out is 16, so that the growing factors are compressed."""
    hyperparameters = {
        "clusters": len(memberships[0]),
        "importance": "energy",
        "normalise": normalise,
        "downlink_rank": 5,
    }
    changes = {"clients__tiers": tiers(1.0, 0.3)}
    run, reference = start(hyperparameters, **changes), start(hyperparameters, **changes)
    assert [mask_ratio(client) for client in run.prepared.clients].count(0.3) == 2
    plant(run, memberships)
    for _ in range(4):
        run.round()
    W, heads = dense_fedhft(reference, np.array(memberships, np.float64), 4, 5, normalise)
    for j in range(len(memberships[0])):
        for target, ours in zip(TARGETS, run.server.deltas[j], strict=True):
            assert np.linalg.norm(W[j][target]) > 0.05
            assert ours.rank > 5
            np.testing.assert_allclose(ours.dense(), W[j][target], rtol=0, atol=1e-5)
        np.testing.assert_allclose(run.server.heads[j], heads[j], rtol=0, atol=1e-5)
    if len(memberships[0]) == 2:
        # The released code's clusters share one tensor: theirs would be equal.
        assert np.abs(W[0][TARGETS[0]] - W[1][TARGETS[0]]).max() > 1e-3
        assert np.abs(heads[0] - heads[1]).max() > 1e-3


def test_what_travels_is_counted_as_derived_by_hand(start: Callable[..., Run]) -> None:
    """4 targets of 16 x 16, r = 2, ρ = 0.3 keeps ⌈4.8⌉ = 5 rows, downlink rank 3, head 3 · 16 + 3 = 51, J = 2.

    Up: A 4·2·16 = 128, kept rows of B 4·5·2 = 40, head 51: 219 numbers, and 4 bitsets of 2 bytes.
    Down: 4·3·(16 + 16) = 384, head 51: 435 numbers, and π, two float32, in any wire type; in round 0 only head and π.
    """
    for wire, size in (("float32", 4), ("bfloat16", 2)):
        run = start({"wire": wire, "downlink_rank": 3}, clients__tiers=tiers(0.3))
        first, second = run.round(), run.round()
        assert {result.uplink_bytes for result in first.results + second.results} == {219 * size + 8}
        assert {result.downlink_bytes for result in first.results} == {51 * size + 8}
        assert {result.downlink_bytes for result in second.results} == {435 * size + 8}
        assert {result.report.recorded["mask_size"] for result in second.results} == {20}
        (cost,) = run.prepared.costs["fedhft"].values()
        assert (cost.uplink_bytes, cost.downlink_bytes) == (219 * size + 8, 435 * size + 8)
        assert (cost.uplink, cost.downlink) == (219, 437)


def test_no_bitset_travels_where_every_row_is_kept(start: Callable[..., Run]) -> None:
    """4 · (2·16 + 16·2) + 51 = 307 numbers, all of the LoRA and the head."""
    done = start({}).round()
    assert {result.uplink_bytes for result in done.results} == {307 * 4}


def test_pre_with_all_rows_is_post(start: Callable[..., Run]) -> None:
    pre, post = start({"timing": "pre"}), start({"timing": "post"})
    for _ in range(3):
        pre.round()
        post.round()
    for ours, theirs in zip(arrays(pre.server).values(), arrays(post.server).values(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("timing", ["pre", "post"])
def test_local_heads_stay_with_their_clients(start: Callable[..., Run], timing: str) -> None:
    run = start({"timing": timing}, head="local")
    done = run.round()
    assert run.server.heads == ()
    assert {result.payload.head is None for result in done.results} == {True}
    heads = np.stack([run.state(client.id).head for client in run.prepared.clients])
    assert np.abs(heads - heads[0])[1:].max(axis=1).min() > 1e-4
    assert all(not isinstance(feature, np.ndarray) for feature in run.server.features.values())


def test_clients_start_every_round_from_their_mixture_with_a_fresh_lora(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """B = 0, and A the same for all clients and rounds; W0 + Σ_j π_kj ΔW_j is the frozen branch."""
    run = start({"downlink_rank": WIDTH})
    plant(run, [[1, 0], [0, 1], [0.5, 0.5], [0.5, 0.5]])
    seen: list[dict[str, Any]] = []
    train = LocalTrainer.train

    def look(trainer: LocalTrainer) -> None:
        names = {name for group in run.adapter.trainable_groups() for name in [group.name]}
        seen.append({name: run.adapter.read(name) for name in ("lora", "rest", "head")} | {"trainable": names})
        train(trainer)

    monkeypatch.setattr(LocalTrainer, "train", look)
    run.round()
    before = run.server
    run.round()
    lora, rest = run.adapter.layout("lora"), run.adapter.layout("rest")
    parts = [{slot.part: view for slot, view in lora.items(entry["lora"])} for entry in seen]
    assert len(seen) == 8
    assert all(not entry["rest"].any() for entry in seen[:4])
    assert all(not delta.B.any() for entry in seen for delta in split(lora, entry["lora"]))
    assert all(np.array_equal(entry["A"], parts[0]["A"]) and entry["A"].any() for entry in parts)
    assert {frozenset(entry["trainable"]) for entry in seen} == {frozenset({"lora", "head"})}
    by_size = sorted(run.prepared.clients, key=lambda client: (-client.num_examples, client.id))
    for client, entry in zip(by_size, seen[4:], strict=True):
        pi = before.memberships[client.id]
        for target, delta in enumerate(split(rest, entry["rest"])):
            mixed = sum(pi[j] * before.deltas[j][target].dense() for j in range(2))
            assert np.abs(mixed).max() > 1e-4
            np.testing.assert_allclose(delta.dense(), mixed, rtol=0, atol=1e-6)
        np.testing.assert_allclose(entry["head"], pi @ np.stack(before.heads), rtol=0, atol=1e-6)


def test_pre_trains_only_the_rows_that_it_keeps(start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """⌈0.3·16⌉ = 5 rows: per target A 32 and B 5·2 = 10 parameters, so 4·42 = 168, and the head's 51. Under `post`
    all 4·64 = 256 train. The rows that are not kept belong to no parameter at all."""
    counts: dict[str, set[Any]] = {}
    train = LocalTrainer.train
    for timing in ("pre", "post"):
        run = start({"timing": timing}, clients__tiers=tiers(0.3))
        counts[timing] = set()

        def look(trainer: LocalTrainer, run: Run = run, found: set[Any] = counts[timing]) -> None:
            shapes = {tuple(p.shape) for p in run.adapter.model.parameters() if p.requires_grad and p.ndim == 2}
            found.add((run.adapter.num_trainable(), frozenset(shapes)))
            train(trainer)

        monkeypatch.setattr(LocalTrainer, "train", look)
        done = run.round()
        run.round()
        assert next(iter(run.prepared.costs["fedhft"].values())).trainable == (219 if timing == "pre" else 307)
        assert {result.uplink_bytes for result in done.results} == {219 * 4 + 8}
    assert counts == {
        "pre": {(219, frozenset({(2, 16), (5, 2), (3, 16)}))},
        "post": {(307, frozenset({(2, 16), (16, 2), (3, 16)}))},
    }


def test_pre_draws_its_rows_first_and_then_knows_them(start: Callable[..., Run]) -> None:
    """Round 0: random, by (seed, purpose, round, client). Round 1: the rows in which the downlink mixture plus the
    client's previous update, as a dense matrix, has most energy."""
    run = start({"timing": "pre", "downlink_rank": 3}, clients__tiers=tiers(0.3))
    layout = run.initial.layouts["lora"]
    first = {result.client.id: result.payload for result in run.round().results}
    drawn = {id: unpack_masks(layout, payload.masks) for id, payload in first.items()}
    for id, masks in drawn.items():
        for target, mask in zip(TARGETS, masks, strict=True):
            expected = random_rows(WIDTH, 0.3, keyed_rng(3, f"rows {target}", 0, id))
            assert mask.sum() == 5
            assert np.array_equal(mask, expected)
    assert len({np.stack(masks).tobytes() for masks in drawn.values()}) == 4
    downlinks = received(run.method, run.server, run.prepared.clients)
    previous = {id: state.previous for id, state in run.states().items()}
    for result in run.round().results:
        id = result.client.id
        rest = split(run.initial.layouts["rest"], decode(downlinks[id].rest))
        for mask, mixture, own in zip(
            unpack_masks(layout, result.payload.masks), rest, split(layout, previous[id]), strict=True
        ):
            known = mixture.dense().astype(np.float64) + own.dense()
            assert np.flatnonzero(mask).tolist() == largest_rows((known**2).sum(axis=1), 0.3)


def test_the_final_adapter_of_pre_has_all_rows(start: Callable[..., Run]) -> None:
    """B [16, 2] with zeros outside the mask: the file of a client needs no knowledge of its rows."""
    run = start({"timing": "pre"}, clients__tiers=tiers(0.3))
    for result in run.serve().values():
        assert result.adapter is not None
        for target, mask in zip(TARGETS, unpack_masks(run.initial.layouts["lora"], result.payload.masks), strict=True):
            B = result.adapter[f"lora.{target}.B"]
            assert B.shape == (WIDTH, RANK)
            assert np.array_equal(B.any(axis=1), mask)


def test_the_previous_update_of_pre_is_what_was_sent(start: Callable[..., Run]) -> None:
    run = start({"timing": "pre"}, clients__tiers=tiers(0.3))
    layout = run.initial.layouts["lora"]
    for result in run.round().results:
        payload, state = result.payload, run.state(result.client.id)
        masks = unpack_masks(layout, payload.masks)
        for delta, mask in zip(split(layout, state.previous), masks, strict=True):
            assert delta.B[mask].any(axis=1).all()
            assert not delta.B[~mask].any()
        assert np.array_equal(join(keep_rows(split(layout, state.previous), masks)), payload.factors)


def test_a_row_that_nobody_holds_gets_no_update_with_real_masks(start: Callable[..., Run]) -> None:
    """Four clients with 3 of 16 rows each hold at most 12: the other rows of ΔW stay zero, the held ones do not."""
    run = start({"importance": "energy"}, clients__tiers=tiers(0.15))
    done = run.round()
    held = np.stack(
        [np.stack(unpack_masks(run.initial.layouts["lora"], result.payload.masks)) for result in done.results]
    )
    assert held.sum(axis=2).min() == held.sum(axis=2).max() == 3
    for target, anybody in enumerate(held.any(axis=0)):
        assert (~anybody).any()
        for j in range(2):
            norms = np.linalg.norm(run.server.deltas[j][target].dense(), axis=1)
            assert norms[anybody].min() > 1e-5
            assert norms[~anybody].max() < 1e-9


def test_planted_groups_are_recovered(start: Callable[..., Run], minilm: Any) -> None:
    """Two groups of four clients whose labels conflict, on a pretrained model (a random one's features do not tell the
    topics apart), with half of them masked: adjusted Rand index 1.0 after the refit that ends the second round."""
    run = start(
        {"warmup_rounds": 1},
        model={"path": str(minilm)},
        data__max_length=32,
        data__examples_per_client=24,
        clients__count=8,
        clients__tiers=tiers(1.0, 0.5),
        train={"lr": 0.02, "batch_size": 16},
    )
    run.round()
    assert all(pi.tolist() == [0.5, 0.5] for pi in run.server.memberships.values())
    run.round()
    latent = run.prepared.data.latent_group
    ids = sorted(latent)
    assert sorted(latent.values()) == [0] * 4 + [1] * 4
    assert adjusted_rand_score([latent[id] for id in ids], [run.server.memberships[id].argmax() for id in ids]) == 1


# ---------------------------------------------------------------- one client's task, without training


@dataclass
class FakeLocal:
    """A client's side of a round whose training puts given values into the adapter."""

    client: Client
    adapter: Adapter
    trained: Any
    fisher: Mapping[str, Any] | None = None
    server_round: int = 0
    seed: int = 3

    def train(self) -> None:
        self.adapter.load("lora", self.trained)

    def importance(self) -> Mapping[str, Any]:
        assert self.fisher is not None, "the Fisher information was asked for"
        return self.fisher

    def evaluate(self, split: Any) -> Evaluation:
        raise AssertionError("not needed")

    def rng(self, purpose: str) -> np.random.Generator:
        return keyed_rng(self.seed, purpose, self.server_round, self.client.id)

    def record(self, name: str, value: Any) -> None:
        pass


def train_once(
    run: Run, hyperparameters: Mapping[str, Any], ratio: float, fisher: Any = None
) -> tuple[Any, Any, ClientState]:
    """Return what a client with that ratio trained (split), its masks, and its state."""
    layout = run.initial.layouts["lora"]
    trained = np.random.default_rng(8).normal(size=layout.size).astype(np.float32)
    method = FedHft(lora=LoraSection(rank=RANK), **hyperparameters)
    local = FakeLocal(Client("ann", 0, 5, capacity={"mask_ratio": ratio}), run.adapter, trained, fisher)
    head = encode(run.initial.vectors["head"], "float32")
    payload, state = method.train_client(
        run.adapter, ClientState(None, None), ClusterMixture(None, head, np.ones(1, "f4")), local
    )
    masks = unpack_masks(layout, payload.masks)
    trained_deltas = split(layout, trained)
    assert np.array_equal(payload.factors, join(keep_rows(trained_deltas, masks)))
    return trained_deltas, masks, state


def test_post_keeps_the_rows_of_most_energy_or_fisher_information(start: Callable[..., Run]) -> None:
    """⌈0.4·16⌉ = 7 rows, exactly; the two measures choose differently, and `fisher` is the default."""
    run = start({})
    rng = np.random.default_rng(1)
    fisher = {target: rng.random(WIDTH) for target in TARGETS}
    trained, by_energy, state = train_once(run, {"importance": "energy"}, 0.4)
    _, by_fisher, _ = train_once(run, {"importance": "fisher"}, 0.4, fisher)
    _, by_default, _ = train_once(run, {}, 0.4, fisher)
    for target, delta, energetic, informative in zip(TARGETS, trained, by_energy, by_fisher, strict=True):
        assert energetic.sum() == informative.sum() == 7
        assert np.flatnonzero(energetic).tolist() == largest_rows((delta.dense() ** 2).sum(axis=1), 0.4)
        assert np.flatnonzero(informative).tolist() == largest_rows(fisher[target], 0.4)
        assert not np.array_equal(energetic, informative)
    assert np.array_equal(np.stack(by_fisher), np.stack(by_default))
    assert state.previous is None


def test_ties_go_to_the_lower_row(start: Callable[..., Run]) -> None:
    """All rows equally important: the first ⌈0.4·16⌉ = 7."""
    _, masks, _ = train_once(start({}), {}, 0.4, dict.fromkeys(TARGETS, np.ones(WIDTH)))
    assert [np.flatnonzero(mask).tolist() for mask in masks] == [list(range(7))] * 4


def test_a_client_that_keeps_everything_measures_nothing(start: Callable[..., Run]) -> None:
    """`FakeLocal` fails when asked for the Fisher information."""
    _, masks, _ = train_once(start({}), {}, 1.0)
    assert np.stack(masks).all()
