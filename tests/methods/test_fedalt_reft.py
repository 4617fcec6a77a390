"""FedALT whose two branches are LoReFT interventions."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from agreement import agree, of_workers, together
from received import received
from scipy.linalg import polar

from fedray.adapters.kinds.reft import ReftKind
from fedray.config import ReftSection
from fedray.data.shards import Shard
from fedray.errors import ConfigError

REFT = {"name": "fedalt", "adapter": "reft"}
IDS = ("client_000", "client_001", "client_002")


def edited(views, place, h):
    """Φ(h) = h + Rᵀ(W h + b − R h) of one place, h [d]."""
    r, w, b = (views[f"{place}.{part}"].astype(np.float64) for part in ("R", "W", "b"))
    return h + r.T @ (w @ h + b - r @ h)


@pytest.mark.parametrize("mixer", ["adaptive", "fixed", "none"])
def test_a_token_is_mixed_as_by_hand(start, mixer):
    """The edit of a block's first token, computed anew from R, W, b and G of both branches."""
    run = start({**REFT, "mixer": mixer, **({"alpha": 0.3} if mixer == "fixed" else {})}, reft__positions="f1")
    adapter, rng = run.adapter, np.random.default_rng(0)
    for name in ("reft", "rest"):
        layout = adapter.layout(name)
        vector = rng.normal(size=layout.size).astype(np.float32)
        for slot, view in layout.items(vector):
            if slot.part == "R":
                view[...] = polar(view)[0]
        adapter.load(name, vector)
    if mixer == "adaptive":
        adapter.load("mixer", rng.normal(size=adapter.layout("mixer").size).astype(np.float32))
    own, rest = (adapter.layout(name).views(adapter.read(name)) for name in ("reft", "rest"))
    path = adapter.layout("reft").slots[0].module
    block = adapter.model.get_submodule(path.rpartition(".")[0])
    seen = {}
    block.register_forward_pre_hook(lambda _, args: seen.update(into=args[0]))
    with torch.no_grad():
        tokens = torch.tensor([[5, 6, 7]])
        adapter.model.eval()(input_ids=tokens)
        (edit,) = block._forward_hooks.values()
        block._forward_hooks.clear()
        plain = block(seen["into"])
        plain = plain[0] if isinstance(plain, tuple) else plain
        found = edit(block, (), plain)
    h = plain[0, 0].numpy().astype(np.float64)
    g = adapter.layout("mixer").views(adapter.read("mixer"))[f"{path}.G"] if mixer == "adaptive" else None
    if g is None:
        w_rest, w_own = {"fixed": (0.7, 0.3), "none": (1.0, 1.0)}[mixer]
    else:
        shares = np.exp(g @ h)
        w_rest, w_own = shares / shares.sum()
    expected = h + w_own * (edited(own, path, h) - h) + w_rest * (edited(rest, path, h) - h)
    np.testing.assert_allclose(found[0, 0].numpy(), expected, atol=1e-5)
    assert np.abs(expected - h).max() > 0.1
    assert torch.equal(found[0, 1:], plain[0, 1:])


@pytest.mark.parametrize("kind", ["loreft", "noreft", "direft", "nodireft"])
def test_a_rest_that_nobody_made_does_nothing(start, kind):
    """In the first round the second branch leaves every token as it is."""
    run = start({**REFT, "mixer": "none"}, reft__kind=kind)
    plain = start({"name": "local", "adapter": "reft"}, reft__kind=kind)
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    for one in (run, plain):
        one.adapter.load("reft", run.initial.vectors["reft"])
        one.adapter.load("head", run.initial.head())
    run.adapter.load("rest", ReftKind(reft=ReftSection(rank=2, kind=kind)).idle(run.adapter.layout("rest")))
    with torch.no_grad():
        found, expected = (one.adapter.model.eval()(**batch).logits for one in (run, plain))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_two_rounds_with_the_mean_of_the_others(start):
    """The rest of world of a client is the plain mean of the others' interventions, as they were sent; its own one goes
    on, its mixer is private, and the frozen branch stays as it was loaded."""
    run = start(REFT)
    sent = {id: result.payload.lora for id, result in run.serve().items()}
    first = run.round()
    size = run.initial.layouts["reft"].size + run.initial.layouts["head"].size
    assert all(result.uplink_bytes == 4 * size for result in first.results)
    down = received(run.method, run.server, run.prepared.clients)
    for id in IDS:
        others = [vector for other, vector in sent.items() if other != id]
        np.testing.assert_allclose(down[id].rest, (others[0] + others[1]) / 2, atol=1e-6)
        assert np.array_equal(run.state(id).lora, sent[id])
        assert not np.array_equal(run.state(id).mixer, run.initial.vectors["mixer"])
    (result,) = run.serve(IDS[0]).values()
    for slot, found in run.adapter.layout("rest").items(run.adapter.read("rest")):
        loaded = run.adapter.layout("rest").views(down[IDS[0]].rest)[slot.name]
        np.testing.assert_allclose(found, polar(loaded)[0] if slot.part == "R" else loaded, atol=1e-5)
    assert not np.array_equal(result.payload.lora, sent[IDS[0]])


@pytest.mark.parametrize("method", [REFT, {**REFT, "rest": "geometric_median"}], ids=["mean", "median"])
def test_clients_in_one_step(start, method, caplog):
    """Also where one client's texts are so short that they have no last tokens: its mixer there does not move."""
    run = start(method, train__batch_size=2, train__epochs=2, reft__positions="f3+l2")
    short = run.pool.shards[IDS[1]]
    tables = {split: shortened(table) for split, table in short.tables.items()}
    run.pool.shards[IDS[1]] = Shard(IDS[1], tables)
    for _ in range(2):
        tasks = run.tasks(IDS, measure=True)
        alone = [run.worker.train(task) for task in tasks]
        agree(together(run.worker, tasks), alone)
        run.round()
    assert not of_workers(caplog)
    layout = run.initial.layouts["mixer"]
    first, last = (layout.views(vector) for vector in (run.initial.vectors["mixer"], run.state(IDS[1]).mixer))
    for slot in layout.slots:
        assert np.array_equal(first[slot.name], last[slot.name]) == slot.module.endswith("suffix")


def shortened(table):
    """The table with three tokens of every text."""
    cut = pa.array([row[:3] for row in table["input_ids"].to_pylist()], table.schema.field("input_ids").type)
    return table.set_column(table.schema.get_field_index("input_ids"), table.schema.field("input_ids"), cut)


def test_a_tier_with_fewer_interventions(start):
    """A client that edits one of two blocks receives the others' mean there; what nobody else holds does nothing."""
    tiers = {
        "weak": {"clients": [IDS[0]], "reft_layers": [1]},
        "rest": {"clients": [IDS[1], IDS[2]], "reft_layers": [0]},
    }
    run = start(REFT, clients__tiers=tiers)
    run.rounds(2)
    down = received(run.method, run.server, run.prepared.clients)
    assert down[IDS[0]].rest is None or np.array_equal(
        down[IDS[0]].rest, run.method.adapter.idle(run.server.own[IDS[0]])
    )
    own = run.server.own[IDS[1]]
    np.testing.assert_allclose(down[IDS[1]].rest, run.server.latest[IDS[2]], atol=1e-6)
    assert own.size == run.server.latest[IDS[1]].size


def test_first_values_are_common_unless_asked_for(start):
    common, independent = start(REFT), start({**REFT, "a_init": "independent"})
    for run, expected in ((common, 1), (independent, 3)):
        firsts = [run.method.init_client(run.initial, client).lora.tobytes() for client in run.prepared.clients]
        assert len(set(firsts)) == expected


def test_what_has_no_meaning_is_refused(start):
    with pytest.raises(ConfigError, match="fedalt.mask: has no effect without adapter: lora, whose rows of B"):
        start({**REFT, "mask": "energy"})
    with pytest.raises(ConfigError, match="adapter: full cannot be mixed with a second, frozen one; use lora or reft"):
        start({"name": "fedalt", "adapter": "full"})


def test_the_second_branch_is_frozen(start):
    run = start(REFT)
    names = {group.name for group in run.adapter.trainable_groups()}
    assert names == {"reft", "mixer", "head"}
