"""RoLoRA: one factor at a time, whose mean is the mean of the products."""

from dataclasses import replace

import numpy as np
import pytest
from lora_clients import INITIAL, LAYOUT, LORA, cohort, factors, mean_head, products

from fedray.errors import ConfigError
from fedray.methods.bases.shared_adapter import GlobalAdapter
from fedray.methods.parts.capacity import own_layout
from fedray.methods.protocol import Update
from fedray.methods.rolora import RoLora


def test_the_mean_of_the_products_is_exact_in_every_round(start):
    """Uniform over three clients of unequal sizes; the factor that rests keeps its bits, and only the other is sent."""
    run = start("rolora")
    layout, head = run.initial.layouts["lora"], run.initial.layouts["head"].size
    for server_round in range(4):
        trained, resting = ("A", "B") if server_round % 2 else ("B", "A")
        old = run.server.shared.adapter
        each = []
        for result in run.serve().values():
            whole = old.copy()
            whole[layout.mask({trained})] = result.payload.adapter
            each.append(products(layout, whole))
        done = run.round()
        assert all(result.uplink_bytes == 4 * (layout.part(trained).size + head) for result in done.results)
        assert all(result.downlink_bytes == 4 * (layout.size + head) for result in done.results)
        new = run.server.shared.adapter
        for found, expected in zip(products(layout, new), zip(*each, strict=True), strict=True):
            np.testing.assert_allclose(found, sum(expected) / 3, atol=1e-6)
            assert np.abs(found).max() > 1e-4
        assert np.array_equal(new[layout.mask({resting})], old[layout.mask({resting})])
        assert not np.array_equal(new[layout.mask({trained})], old[layout.mask({trained})])


def test_a_round_of_b_is_ffa_loras(start):
    run, other = start("rolora"), start({"name": "ffa_lora", "weights": "uniform"})
    run.round()
    other.round()
    is_b = run.initial.layouts["lora"].mask({"B"})
    assert np.array_equal(run.server.shared.adapter[is_b], other.server.shared.adapter)
    assert np.array_equal(run.server.shared.head, other.server.shared.head)


def test_a_round_of_a_under_zero_b_changes_no_output(start):
    run = start("rolora", head="frozen_label_text", evaluation__every=1)
    run.federation.server_round = 1
    run.federation.server = replace(run.server, server_round=1)
    first = run.round()
    assert not np.array_equal(run.server.shared.adapter, run.initial.vectors["lora"])
    for result in first.results:
        assert result.report.evaluation("aggregated") == result.report.evaluation("personalised")


def sent(updates, part):
    """The updates of a round that trains this factor: what is left of theirs, and each client's factors by target."""
    found, matrices = [], []
    for update in updates:
        pairs = factors(own_layout(LAYOUT, update.capacity), update.payload.adapter)
        own = [pair["AB".index(part)] for pair in pairs]
        values = np.concatenate([matrix.ravel() for matrix in own]).astype(np.float32)
        found.append(Update(update.client, update.num_examples, GlobalAdapter(values, update.payload.head)))
        matrices.append(own)
    return found, list(zip(*matrices, strict=True))


@pytest.mark.parametrize("part", ["A", "B"])
def test_a_round_by_hand_with_unequal_ranks(part):
    """Ranks 3, 2 and 3, weights n_k: the third component is the mean of the two clients that hold it."""
    method = RoLora(adapter=LORA, weights="examples")
    updates, matrices = sent(cohort(4, (9, 5, 7), (None, 2, None)), part)
    before = replace(method.init_server(INITIAL, []), server_round="BA".index(part))
    after, _ = method.aggregate_train(before, updates)
    assert after.server_round == before.server_round + 1
    pairs = zip(factors(LAYOUT, before.shared.adapter), factors(LAYOUT, after.shared.adapter), strict=True)
    for (old, new), (one, two, three) in zip(pairs, matrices, strict=True):
        trained, resting = "AB".index(part), 1 - "AB".index(part)
        assert np.array_equal(new[resting], old[resting])
        found, x, y, z = (m if part == "A" else m.T for m in (new[trained], one, two, three))  # components are rows
        np.testing.assert_allclose(found[:2], (9 * x[:2] + 5 * y + 7 * z[:2]) / 21, atol=1e-6)
        np.testing.assert_allclose(found[2], (9 * x[2] + 7 * z[2]) / 16, atol=1e-6)
    np.testing.assert_allclose(after.shared.head, mean_head(updates), atol=1e-6)


def test_the_resting_factors_moments_rest(start):
    run = start({"name": "rolora", "server_optimizer": "momentum"})
    layout = run.initial.layouts["lora"]
    (name,) = run.server.adapter_optimizer
    for trained in "BABA":
        before = run.server.adapter_optimizer[name]
        run.round()
        after, where = run.server.adapter_optimizer[name], layout.mask({trained})
        assert np.array_equal(after[~where], before[~where])
        assert not np.array_equal(after[where], before[where])


def test_rounds_without_updates_count():
    method = RoLora(adapter=LORA)
    server, _ = method.aggregate_train(method.init_server(INITIAL, []), [])
    assert server.server_round == 1
    assert np.array_equal(server.shared.adapter, INITIAL.vectors["lora"])
    after, _ = method.aggregate_train(server, sent(cohort(5, (3, 4)), "A")[0])
    is_b = LAYOUT.mask({"B"})
    assert np.array_equal(after.shared.adapter[is_b], INITIAL.vectors["lora"][is_b])
    assert not np.array_equal(after.shared.adapter[~is_b], INITIAL.vectors["lora"][~is_b])


def test_the_only_clients_factor_is_taken(start):
    run = start("rolora", clients__count=1, data__groups=1)
    for part in "BA":
        (result,) = run.serve().values()
        run.round()
        where = run.initial.layouts["lora"].mask({part})
        np.testing.assert_allclose(run.server.shared.adapter[where], result.payload.adapter, rtol=1e-6)


def test_what_cannot_be_is_refused(start):
    with pytest.raises(ConfigError, match=r"rolora\.adapter: reft has no factors A and B.*use adapter: lora"):
        start({"name": "rolora", "adapter": "reft"})
    with pytest.raises(ConfigError, match=r"rolora\.mask: every other round sends no B"):
        start({"name": "rolora", "mask": "energy"})
