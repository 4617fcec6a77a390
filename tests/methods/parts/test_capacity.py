"""Clients that hold a part of the common adapter."""

import numpy as np
import pytest
from received import received

from fedray.adapters.layout import Layout, Slot
from fedray.methods.parts.capacity import gather, held_mean, own_layout, places, scatter

LORA = Layout((Slot("q", "A", (3, 2)), Slot("q", "B", (2, 3)), Slot("head", "tensor", (4,))))
"""A is 0 to 5, B 6 to 11, the head 12 to 15."""
REFT = Layout(
    tuple(
        Slot(f"blocks.{index}.prefix", part, shape)
        for index in (0, 1, 10)
        for part, shape in (("R", (1, 2)), ("W", (1, 2)), ("b", (1,)))
    )
)


def test_a_lower_rank_is_the_first_rows_of_a_and_columns_of_b():
    """B = [[6, 7, 8], [9, 10, 11]]; with r = 2 its columns 0 and 1 are held."""
    own = own_layout(LORA, {"lora_rank": 2})
    assert [slot.shape for slot in own.slots] == [(2, 2), (2, 2), (4,)]
    vector = np.arange(16, dtype=np.float32)
    assert gather(LORA, own, vector).tolist() == [0, 1, 2, 3, 6, 7, 9, 10, 12, 13, 14, 15]
    back = scatter(LORA, own, gather(LORA, own, vector))
    assert np.flatnonzero(np.isnan(back)).tolist() == [4, 5, 8, 11]
    assert np.array_equal(back[~np.isnan(back)], gather(LORA, own, vector))


def test_the_product_of_a_lower_rank_is_that_of_the_components_kept():
    rng = np.random.default_rng(0)
    vector = rng.normal(size=16).astype(np.float32)
    own = own_layout(LORA, {"lora_rank": 1})
    (_, a), (_, b), _ = own.items(gather(LORA, own, vector))
    (_, whole_a), (_, whole_b), _ = LORA.items(vector)
    np.testing.assert_array_equal(b @ a, np.outer(whole_b[:, 0], whole_a[0]))


def test_layers_are_known_by_their_index_and_not_by_a_part_of_a_name():
    own = own_layout(REFT, {"reft_layers": (1,)})
    assert {slot.module for slot in own.slots} == {"blocks.1.prefix"}
    assert gather(REFT, own, np.arange(15, dtype=np.float32)).tolist() == [5, 6, 7, 8, 9]
    nothing = own_layout(REFT, {"reft_layers": (3,)})
    assert gather(REFT, nothing, np.zeros(15, np.float32)).size == 0


@pytest.mark.parametrize("held", [{}, {"lora_rank": 3}, {"lora_rank": 8}, {"reft_layers": (0,)}])
def test_who_holds_everything_gets_the_very_same_vector(held):
    own = own_layout(LORA, held)
    vector = np.arange(16, dtype=np.float32)
    assert own is LORA
    assert places(LORA, own) is None
    assert gather(LORA, own, vector) is vector
    assert scatter(LORA, own, vector) is vector


def test_a_value_is_averaged_over_those_who_hold_it():
    """Weights 1 and 3: where both hold it (1·4 + 3·8)/4 = 7, where only the first does 4. Nobody holds what a layout of
    rank 2 lacks if everybody has that."""
    low = own_layout(LORA, {"lora_rank": 2})
    before = np.full(16, -1, np.float32)
    fours, eights = np.full(16, 4, np.float32), np.full(low.size, 8, np.float32)
    both = held_mean(before, [(None, fours), (places(LORA, low), eights)], [1, 3])
    only_first = [4, 5, 8, 11]
    assert both[only_first].tolist() == [4, 4, 4, 4]
    assert set(np.delete(both, only_first)) == {7}
    nobody = held_mean(before, [(places(LORA, low), eights)] * 2, [1, 3])
    assert nobody[only_first].tolist() == [-1, -1, -1, -1]
    assert set(np.delete(nobody, only_first)) == {8}
    assert held_mean(before, [], []) is before
    few = held_mean(before, [(None, fours), (places(LORA, low), eights)], [1, 3], least=2)
    assert few[only_first].tolist() == [-1, -1, -1, -1]
    assert set(np.delete(few, only_first)) == {7}
    assert held_mean(before, [(None, fours)], [1], least=2).tolist() == before.tolist()


# ---------------------------------------------------------------- whole rounds of tiers

TIERS = {
    "strong": {"clients": ["client_000", "client_002"]},
    "weak": {"clients": ["client_001"], "lora_rank": 1, "reft_layers": [1], "batch_size": 2, "accumulation": 2},
}


@pytest.mark.parametrize("timing", ["pre", "post"])
def test_fedhft_adds_up_products_of_different_ranks(start, timing):
    """With one cluster ΔW is the mean of the clients' products, masked rows over those who keep them; here all do."""
    run = start({"name": "fedhft", "clusters": 1, "timing": timing}, clients__tiers=TIERS)
    done = run.round()
    layout = run.initial.layouts["lora"]
    products = []
    for result in done.results:
        own = own_layout(layout, result.client.capacity)
        views = own.views(result.payload.factors)
        products.append([views[f"{s.module}.B"] @ views[f"{s.module}.A"] for s in own.slots if s.part == "A"])
    assert [p.factors.size for p in (result.payload for result in done.results)] == [256, 128, 256]
    for target, delta in enumerate(run.federation.server.deltas[0]):
        expected = np.mean([product[target] for product in products], axis=0)
        np.testing.assert_allclose(delta.B @ delta.A, expected, atol=1e-6)


def test_fedavg_lets_the_first_components_travel_and_keeps_the_scale(start):
    run = start("fedavg", clients__tiers=TIERS)
    layout = run.initial.layouts["lora"]
    low = own_layout(layout, run.prepared.clients[1].capacity)
    sections = {tier: worker.method.adapter.lora for tier, worker in run.pool.workers.items()}
    scales = {tier: lora.alpha / lora.rank for tier, lora in sections.items()}
    assert scales == {"strong": 4.0, "weak": 4.0}
    np.testing.assert_array_equal(
        run.pool.workers["weak"].initial().vectors["lora"], run.pool.workers["strong"].initial().vectors["lora"]
    )
    run.round()
    shared = run.federation.server.shared.adapter
    downlinks = received(run.method, run.federation.server, run.prepared.clients)
    np.testing.assert_array_equal(downlinks["client_001"].adapter, gather(layout, low, shared))
    assert downlinks["client_000"] is downlinks["client_002"]


def test_fedalt_hears_of_each_component_from_those_who_have_it(start):
    run = start("fedalt", clients__tiers=TIERS)
    run.round()
    layout = run.initial.layouts["lora"]
    latest, own = run.federation.server.latest, run.federation.server.own
    rest = {id: down.rest for id, down in received(run.method, run.federation.server, run.prepared.clients).items()}
    low = own["client_001"]
    np.testing.assert_allclose(
        rest["client_001"], gather(layout, low, (latest["client_000"] + latest["client_002"]) / 2), atol=1e-6
    )
    expected = latest["client_002"].copy()  # the second component: client_002's alone
    where = places(layout, low)
    expected[where] = (expected[where] + latest["client_001"]) / 2
    np.testing.assert_allclose(rest["client_000"], expected, atol=1e-6)


def test_fedreft_listens_only_where_others_edit_the_layer(start):
    """client_000 alone has interventions at layer 0 once client_002 is weak, too: nobody else moves it there."""
    tiers = {"strong": {"clients": ["client_000"]}, "weak": {**TIERS["weak"], "clients": ["client_001", "client_002"]}}
    run = start({"name": "fedreft", "mixing": "fixed", "lam": 1.0, "aggregate": "mean"}, clients__tiers=tiers)
    run.round()
    layout, server = run.initial.layouts["reft"], run.federation.server
    downlinks = received(run.method, server, run.prepared.clients)
    where = places(layout, server.own["client_001"])
    others = downlinks["client_000"].others
    np.testing.assert_allclose(
        others[where], (server.latest["client_001"] + server.latest["client_002"]) / 2, atol=1e-6
    )
    assert np.isnan(np.delete(others, where)).all()
    run.round()  # and what is NaN on the way is never loaded
    assert np.isfinite(run.state("client_000").phi).all()


def test_procrustes_needs_the_same_layers_everywhere(start):
    from fedray.errors import ConfigError

    with pytest.raises(ConfigError, match="needs every tier to edit the same layers"):
        start({"name": "fedreft", "align": "procrustes"}, clients__tiers=TIERS)


@pytest.mark.parametrize("method", ["local", "head_only", {"name": "fedavg", "adapter": "reft"}, "fedreft", "fedalt"])
def test_rounds_of_tiers_are_repeatable_and_count_steps_by_tier(start, method):
    """9 and 7 examples in batches of 4 are 3 and 2 steps; 5 in batches of 2·2 are 2, as of one batch of 4."""
    first, second = (start(method, clients__tiers=TIERS).rounds(2)[-1] for _ in range(2))
    assert [result.report.steps for result in first.results] == [3, 2, 2]
    for a, b in zip(first.results, second.results, strict=True):
        assert a.report.train_loss == b.report.train_loss


def test_full_fine_tuning_is_whole_on_every_tier(start):
    """Whatever a tier could hold of a LoRA; and also if such a tier is the one that draws the common start."""
    tiers = {"weak": TIERS["weak"], "strong": TIERS["strong"]}
    run = start({"name": "fedavg", "adapter": "full"}, clients__tiers=tiers)
    assert next(iter(run.pool.workers)) == "weak"
    run.round()
    assert run.federation.server.shared.adapter.size == run.initial.layouts["full"].size


@pytest.mark.parametrize("head", ["shared", "frozen_label_text", "frozen_random"])
def test_the_head_is_the_same_on_tiers_of_another_precision(start, head):
    """Also where it follows from the base model, which a bfloat16 tier rounds."""
    tiers = {"strong": TIERS["strong"], "half": {"clients": ["client_001"], "precision": "bfloat16"}}
    run = start("fedavg", clients__tiers=tiers, head=head)
    strong, half = (worker.initial().head() for worker in run.pool.workers.values())
    assert np.array_equal(strong, half)
    assert strong.any()
    dtypes = {worker.adapter.model.bert.embeddings.word_embeddings.weight.dtype for worker in run.pool.workers.values()}
    assert {str(dtype) for dtype in dtypes} == {"torch.float32", "torch.bfloat16"}
    for result in run.round().results:
        assert np.isfinite(result.report.train_loss)
