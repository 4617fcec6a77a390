"""FedHFT's masks under FedAvg, FFA-LoRA and FedALT: which rows travel, and what a row is the mean of."""

from itertools import pairwise

import numpy as np
import pytest
from received import received

from fedray.adapters.layout import Layout, Slot
from fedray.aggregation.masks import row_count
from fedray.errors import ConfigError
from fedray.methods.parts.factors import pack_masks, split, unpack_masks
from fedray.methods.parts.masking import masked_places

IDS = ("client_000", "client_001", "client_002")
HALF = {"all": {"share": 1.0, "mask_ratio": 0.5}}
COMMON = Layout((Slot("x", "A", (2, 3)), Slot("x", "B", (4, 2))))


def test_places_by_hand():
    """A is 0 to 5, B's rows are 6 7, 8 9, 10 11, 12 13; a client of rank 1 has 0 1 2 of A and 6 8 10 12 of B."""
    bits = pack_masks([np.array([True, False, False, True])])
    assert masked_places(COMMON, COMMON, None) is None
    assert masked_places(COMMON, COMMON, bits).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 12, 13]
    low = Layout((Slot("x", "A", (1, 3)), Slot("x", "B", (4, 1))))
    assert masked_places(COMMON, low, bits).tolist() == [0, 1, 2, 6, 12]
    only_b = COMMON.part("B")
    assert masked_places(only_b, only_b, bits).tolist() == [0, 1, 6, 7]


def expanded(layout, payload, sent):
    """What a client sent, NaN where it sent nothing; by its own arithmetic."""
    masks, start = iter(unpack_masks(layout, payload.rows)), 0
    values = []
    for slot in layout.slots:
        mask = next(masks) if slot.part == "B" else np.ones(slot.shape[0], bool)
        tensor = np.full(slot.shape, np.nan)
        number = int(mask.sum()) * slot.shape[1]
        tensor[mask] = sent[start : start + number].reshape(-1, slot.shape[1])
        start += number
        values.append(tensor.reshape(-1))
    assert start == sent.size
    return np.concatenate(values)


@pytest.mark.parametrize("name", ["fedavg", "ffa_lora"])
@pytest.mark.parametrize("importance", ["fisher", "energy"])
def test_a_row_is_the_mean_of_those_who_sent_it(start, name, importance):
    """9, 5 and 7 examples; a row that nobody sent stays. Half of 16 rows travel, with a bit for each."""
    run = start({"name": name, "mask": importance}, clients__tiers=HALF)
    layout = run.server.layout
    for _ in range(2):
        before = run.server.shared.adapter
        payloads = [result.payload for result in run.serve().values()]
        done = run.round()
        points = np.stack([expanded(layout, payload, payload.adapter) for payload in payloads])
        weights = np.where(np.isnan(points), 0, np.array([[9], [5], [7]]))
        total = np.nansum(points * weights, axis=0)
        expected = np.where(weights.sum(0) > 0, total / np.maximum(weights.sum(0), 1), before)
        np.testing.assert_allclose(run.server.shared.adapter, expected, atol=1e-6)
        kept = sum(row_count(slot.shape[0], 0.5) * slot.shape[1] for slot in layout.slots if slot.part == "B")
        sizes = layout.mask({"A"}).sum() + kept + run.initial.layouts["head"].size
        bits = sum(-(-slot.shape[0] // 8) for slot in layout.slots if slot.part == "B")
        assert [result.uplink_bytes for result in done.results] == [4 * sizes + bits] * 3
    assert any(not np.array_equal(a.rows, b.rows) for a, b in pairwise(payloads))


def test_the_rows_sent_are_those_of_most_energy(start):
    run = start({"name": "fedavg", "mask": "energy"}, clients__tiers=HALF)
    result = run.serve(IDS[0])[IDS[0]]
    trained = split(run.initial.layouts["lora"], run.adapter.read("lora"))
    for mask, factors in zip(unpack_masks(run.server.layout, result.payload.rows), trained, strict=True):
        lengths = np.linalg.norm(factors.B.astype(float) @ factors.A, axis=1)
        assert lengths[mask].min() >= lengths[~mask].max()


@pytest.mark.parametrize("name", ["fedavg", "fedalt"])
def test_who_keeps_all_rows_is_not_masked(start, name):
    masked, plain = (start({"name": name, "mask": mask}) for mask in ("fisher", "none"))
    for one, other in zip(*(run.rounds(2) for run in (masked, plain)), strict=True):
        assert [r.uplink_bytes for r in one.results] == [r.uplink_bytes for r in other.results]
    down, same = (received(run.method, run.server, run.prepared.clients) for run in (masked, plain))
    for id in IDS:
        if name == "fedalt":
            assert np.array_equal(down[id].rest, same[id].rest)
        else:
            np.testing.assert_allclose(down[id].adapter, same[id].adapter, atol=1e-7)


def test_fedalts_rest_of_world_is_made_of_the_rows_that_others_sent(start):
    """Client k's row is the plain mean of the other clients that sent it, and zero where none did; its own LoRA keeps
    all rows."""
    run = start({"name": "fedalt", "mask": "energy"}, clients__tiers=HALF)
    payloads = {id: result.payload for id, result in run.serve().items()}
    run.round()
    layout = run.server.layout
    points = {id: expanded(layout, payload, payload.lora) for id, payload in payloads.items()}
    down = received(run.method, run.server, run.prepared.clients)
    for id in IDS:
        others = np.stack([point for other, point in points.items() if other != id])
        held = ~np.isnan(others)
        expected = np.nansum(others, axis=0) / np.maximum(held.sum(0), 1)
        np.testing.assert_allclose(down[id].rest, expected, atol=1e-6)
        assert run.state(id).lora.size == layout.size
        assert np.abs(run.state(id).lora[np.isnan(points[id])]).max() > 0


def test_a_mask_that_would_do_nothing_is_refused(start):
    with pytest.raises(ConfigError, match=r"fedsa_lora\.mask: B does not travel"):
        start({"name": "fedsa_lora", "mask": "energy"})
    with pytest.raises(ConfigError, match=r"fedavg\.adapter: reft has no factors A and B, whose rows could be masked"):
        start({"name": "fedavg", "adapter": "reft", "mask": "energy"})
