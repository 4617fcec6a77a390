"""Fed-PLoRA: the components of a client, what it sees before it trains, and the mean of each component by hand."""

import numpy as np
import pytest

from fedray.adapters.layout import Layout, Slot

TIERS = {"weak": {"clients": ["client_000", "client_002"], "lora_rank": 2}, "strong": {"clients": ["client_001"]}}
"""Weak clients train two of five components, the strong one all of them."""

IDS = ("client_000", "client_001", "client_002")


def components(layout, vector):
    """Each component's numbers, of all targets: row i of every A, column i of every B. [components, numbers]"""
    parts = [view if slot.part == "A" else view.T for slot, view in layout.items(vector)]
    return np.concatenate(parts, axis=1)


def trained(payload, rank):
    """Which components a payload says that it has."""
    if payload.trained is None:
        return np.arange(rank)
    return np.flatnonzero(np.unpackbits(payload.trained, count=rank))


def own_layout(layout, rank):
    return Layout(
        tuple(Slot(s.module, s.part, (rank, s.shape[1]) if s.part == "A" else (s.shape[0], rank)) for s in layout.slots)
    )


def test_with_all_components_it_is_uniform_fedit(start):
    """The updates have the same bits; FedIT's mean is taken along a tree."""
    methods = "fed_plora", {"name": "fedit", "weights": "uniform"}
    run, fedit = (start(method, train__optimizer="sgd") for method in methods)
    for id, result in run.serve().items():
        assert np.array_equal(result.payload.adapter, fedit.serve(id)[id].payload.adapter)
        assert result.payload.trained is None
    run.rounds(2)
    fedit.rounds(2)
    np.testing.assert_allclose(run.server.shared.adapter, fedit.server.shared.adapter, atol=1e-6)
    np.testing.assert_allclose(run.server.shared.head, fedit.server.shared.head, atol=1e-6)


def test_both_branches_together_are_the_common_product(start):
    """Before training, in the second round, where B is not zero: every client begins with the outputs of the common
    LoRA, whatever its tier holds."""
    changes = {"lora__rank": 5, "lora__dropout": 0.0, "evaluation__every": 1, "train__lr": 0.05}
    run, whole = start("fed_plora", clients__tiers=TIERS, **changes), start("fedit", **changes)
    run.round()
    weak = run.pool.workers["weak"].adapter
    common = run.initial.layouts["lora"]
    (task,) = run.tasks(["client_000"], measure=True)
    result = run.pool.workers["weak"].train(task)
    whole.adapter.load("lora", run.server.shared.adapter)
    whole.adapter.load("head", run.server.shared.head)
    from fedray.evaluation.evaluate import evaluate
    from fedray.evaluation.metrics import configured_metric

    metric = configured_metric(run.config)
    table, pad = run.pool.shards["client_000"].tables["test"], run.prepared.data.pad_token_id
    expected = evaluate(whole.adapter.model, table, run.config.task, [metric], 32, pad, "cpu").loss
    assert result.report.evaluation("aggregated").loss == pytest.approx(expected, rel=1e-6)
    chosen = trained(result.payload, 5)
    others = np.setdiff1d(np.arange(5), chosen)
    frozen = components(own_layout(common, 3), weak.read("rest"))
    assert np.array_equal(frozen, components(common, run.server.shared.adapter)[others])
    assert frozen.any()


def test_a_component_is_the_mean_of_those_who_trained_it(start):
    """Uniform, whatever the numbers of examples; a component that nobody trained has its bits."""
    tiers = {"weak": {"share": 1.0, "lora_rank": 2}}
    run = start("fed_plora", clients__tiers=tiers, clients__per_round=2, lora__rank=5)
    common, untouched = run.initial.layouts["lora"], 0
    for _ in range(3):
        before = components(common, run.server.shared.adapter)
        served = run.serve()
        done = run.round()
        sent = [served[result.client.id].payload for result in done.results]
        assert len(sent) == 2
        after = components(common, run.server.shared.adapter)
        for i in range(5):
            mine = [
                components(own_layout(common, 2), payload.adapter)[list(trained(payload, 5)).index(i)]
                for payload in sent
                if i in trained(payload, 5)
            ]
            if mine:
                np.testing.assert_allclose(after[i], np.mean(mine, axis=0, dtype=np.float64), atol=1e-6)
            else:
                untouched += 1
                assert np.array_equal(after[i], before[i])
        heads = np.mean([payload.head for payload in sent], axis=0, dtype=np.float64)
        np.testing.assert_allclose(run.server.shared.head, heads, atol=1e-6)
    assert untouched > 0


def test_components_are_drawn_anew_for_every_round_and_client(start):
    run = start("fed_plora", clients__tiers={"weak": {"share": 1.0, "lora_rank": 2}}, lora__rank=5)
    seen = []
    for _ in range(3):
        seen += [tuple(trained(result.payload, 5)) for result in run.serve().values()]
        again = [tuple(trained(result.payload, 5)) for result in run.serve().values()]
        assert seen[-3:] == again
        run.round()
    assert all(len(set(chosen)) == 2 for chosen in seen)
    assert len(set(seen)) > 3
    assert set().union(*seen) == set(range(5))


def test_what_travels(start):
    """Everybody receives the five components: query and value of two layers, 16 x 16, 5 · 4 · 32 = 640 numbers, and the
    head of 51. A weak client sends 2 · 4 · 32 = 256 of them, the head, and a byte that says which."""
    run = start("fed_plora", clients__tiers=TIERS, lora__rank=5)
    weak, strong, _ = run.round().results
    assert weak.downlink_bytes == strong.downlink_bytes == 4 * (640 + 51)
    assert (weak.uplink_bytes, strong.uplink_bytes) == (4 * (256 + 51) + 1, 4 * (640 + 51))
