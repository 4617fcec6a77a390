"""What holds for every method of the registry: a new file in fedray/methods is tested here without another line.

Methods run with their defaults. Exceptions and their reasons are in tests/helpers/every_method.py; an exception that is
none fails its test.
"""

import numpy as np
import pytest
from agreement import agree, numbers, of_workers, together
from every_method import (
    LOSSLESS,
    NOT_ONE_CLIENTS_OWN,
    ONE_BY_ONE,
    ONE_RANK,
    SAME,
    UNEQUAL_THOUGH_EQUAL,
    entry,
    every_method,
)

import fedray
from fedray.data.shards import Shard
from fedray.errors import ConfigError
from fedray.methods.registry import METHODS
from fedray.storage.codec import pack, read_pack
from fedray.storage.state_tree import leaves, sha256, signature_of

IDS = ("client_000", "client_001", "client_002")

SMALL = {"model__config__num_hidden_layers": 1, "train__max_steps": 2}
"""One layer, and two steps a round."""

EXACT = {"train__optimizer": "sgd", "train__lr": 0.5, "train__clip": None, "lora__dropout": 0.0}
"""Steps without Adam's magnified rounding and without random masks."""


def losses(done, moment):
    return {result.client.id: result.report.evaluation(moment).loss for result in done.results}


def finite(done):
    """Whether every number that the round measured, sent and kept is one."""
    reports = [result.report for result in done.results]
    evaluated = [found.loss for report in reports for by in report.evaluations.values() for found in by.values()]
    measured = [*(report.train_loss for report in reports), *evaluated]
    return np.isfinite([*measured, *done.metrics.values()]).all()


@pytest.mark.parametrize("name", every_method(NOT_ONE_CLIENTS_OWN))
def test_the_only_client_goes_on_from_its_own_model(start, name):
    """K = 1: whatever the server does to one update, the client's next round starts at the loss that the last ended
    with, and its evaluation on all its test examples says so."""
    method = entry(name, **LOSSLESS.get(name, {}))
    run = start(method, clients__count=1, data__groups=1, evaluation__every=1, **SMALL, **EXACT)
    first, second, third = run.rounds(3)
    for done, after in ((first, second), (second, third)):
        (result,), (following,) = done.results, after.results
        assert finite(done)
        assert following.report.evaluation("aggregated").loss == pytest.approx(
            result.report.evaluation("personalised").loss, rel=1e-5
        )
    changed = [losses(done, "personalised")[IDS[0]] - losses(done, "aggregated")[IDS[0]] for done in (first, second)]
    assert np.abs(changed).min() > 1e-4, "training must change the loss"


@pytest.mark.parametrize("name", every_method(UNEQUAL_THOUGH_EQUAL))
def test_equal_clients_train_as_one_alone(start, name):
    """Three clients with the same examples, all of which make one batch: every mean of theirs is one of them."""
    batch = {"train__batch_size": 32, "evaluation__every": 1}
    run, alone = (
        start(entry(name), clients__count=count, data__groups=1, **SMALL, **EXACT, **batch) for count in (3, 1)
    )
    same = run.pool.shards[IDS[0]].tables
    for pool in (run.pool, alone.pool):
        pool.shards = {id: Shard(id, same) for id in pool.shards}
    for _ in range(2):
        done, expected = run.round(), alone.round()
        assert len(done.results) == 3
        for moment in ("aggregated", "personalised"):
            for loss in losses(done, moment).values():
                assert loss == pytest.approx(losses(expected, moment)[IDS[0]], rel=1e-5)


@pytest.mark.parametrize("name", every_method())
def test_absent_clients_and_an_empty_cohort_change_nothing(start, name):
    """Two of three clients take part in each of four rounds. An absent client's state and what the server keeps of it
    stay as they were, a client that missed rounds needs nothing but its downlink, and no update changes no array; only
    counted rounds go on."""
    run = start(entry(name), clients__per_round=2, evaluation__every=1, **SMALL)
    for _ in range(4):
        before, states = dict(leaves(run.server)), run.states()
        done = run.round()
        present = {result.client.id for result in done.results}
        assert len(present) == 2
        assert finite(done)
        (absent,) = set(IDS) - present
        if absent in states:
            assert sha256([("", run.state(absent))]) == sha256([("", states[absent])])
        for path, value in leaves(run.server):
            if absent in path.split("/"):
                assert np.array_equal(value, before[path]), path
    assert set(run.states()) == set(IDS)
    unchanged, _ = run.method.aggregate_train(run.server, [])
    before, after = (
        {path: value for path, value in leaves(server) if isinstance(value, np.ndarray)}
        for server in (run.server, unchanged)
    )
    assert before.keys() == after.keys()
    assert all(np.array_equal(value, after[path]) for path, value in before.items())


@pytest.mark.parametrize("name", every_method())
def test_tiers_of_unequal_rank_work_or_are_refused(start, name):
    """A client with one of two components sends no more than one with both, and `plan` knows how much."""
    tiers = {"weak": {"clients": [IDS[0], IDS[2]], "lora_rank": 1}, "strong": {"clients": [IDS[1]]}}
    if name in ONE_RANK:
        with pytest.raises(ConfigError, match=f"{name}.*rank"):
            start(entry(name), clients__tiers=tiers)
        return
    run = start(entry(name), clients__tiers=tiers, evaluation__every=1, **SMALL)
    for _ in range(2):
        for result in run.serve().values():
            assert signature_of(leaves(result.payload)) in run.prepared.costs[name][result.client.tier].shapes
        done = run.round()
        assert finite(done)
        weak, strong, other = done.results
        assert weak.uplink_bytes == other.uplink_bytes <= strong.uplink_bytes
        planned = run.prepared.costs[name]
        assert [weak.uplink_bytes, strong.uplink_bytes] == [planned[t].uplink_bytes for t in ("weak", "strong")]


@pytest.mark.parametrize("name", every_method())
def test_clients_in_one_step_are_as_one_by_one(start, name, caplog):
    """9, 5 and 7 examples in batches of 4."""
    run = start(entry(name), **SMALL)
    for _ in range(2):
        tasks = run.tasks(IDS, measure=True)
        alone = [run.worker.train(task) for task in tasks]
        agree(together(run.worker, tasks), alone)
        run.round()
    assert bool(of_workers(caplog)) == (name in ONE_BY_ONE)


@pytest.mark.parametrize("name", every_method())
def test_states_survive_their_files(start, name):
    run = start(entry(name), **SMALL)
    run.rounds(2)
    states = [run.server, *run.states().values()]
    stored = read_pack(pack(states))
    for index, state in enumerate(states):
        again = stored.state(index)
        assert type(again) is type(state)
        assert sha256([("", again)]) == sha256([("", state)])
    server = stored.state(0)
    down, same = (run.method.configure_train(one, run.prepared.clients) for one in (run.server, server))
    assert all(np.array_equal(a, b) for a, b in zip(numbers(down), numbers(same), strict=True))


@pytest.mark.parametrize("name", every_method())
def test_plan_counts_the_bytes_of_a_real_round(start, name):
    """Of the second round of two clients, which is what `plan` walks through."""
    run = start(entry(name), clients__count=2, **SMALL)
    run.round()
    planned = run.prepared.costs[name]["default"]
    for result in run.serve().values():
        assert (result.uplink_bytes, result.downlink_bytes) == (planned.uplink_bytes, planned.downlink_bytes)
        assert signature_of(leaves(result.payload)) in planned.shapes


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """All methods in one configuration, two rounds of two of three clients."""
    from tiny import tiny_bert

    return {
        "rounds": 2,
        "seed": 3,
        "method": [entry(name) for name in METHODS.names],
        "model": tiny_bert(max_position_embeddings=64),
        "data": {
            "source": "synthetic",
            "examples_per_client": 12,
            "max_length": 16,
            "cache_dir": str(tmp_path_factory.mktemp("cache")),
        },
        "partition": {"kind": "by_file"},
        "clients": {"count": 3, "per_round": 2},
        "lora": {"rank": 2, "dropout": 0.1},
        "reft": {"rank": 2},
        "train": {"batch_size": 4, "max_steps": 2, "lr": 5e-3},
        "evaluation": {"every": 0},
        "device": "cpu",
        "runtime": "inline",
    }


def bits(result):
    return {summary.method: summary.state_sha256 for summary in result.summaries}


@pytest.fixture(scope="module")
def whole(experiment, tmp_path_factory):
    return bits(fedray.run(experiment, output=tmp_path_factory.mktemp("whole") / "run"))


def test_methods_differ(whole):
    assert set(whole) == set(METHODS.names)
    assert len(set(whole.values())) == len(METHODS.names) - len(SAME)
    assert all(whole[name] == whole[other] for name, other in SAME.items())


def test_ray_and_inline_have_equal_bits(experiment, whole, cluster, tmp_path):
    assert bits(fedray.run({**experiment, "runtime": "ray"}, output=tmp_path / "run")) == whole


def test_a_resumed_run_has_equal_bits(experiment, whole, tmp_path):
    """Every method stops after its first round and is continued by another call, as by another process."""
    first = bits(fedray.run({**experiment, "rounds": 1}, output=tmp_path / "run"))
    assert not set(first.values()) & set(whole.values())
    assert bits(fedray.run(experiment, resume=tmp_path / "run")) == whole
