"""Clients trained together against the same clients one by one."""

import threading
from dataclasses import replace

import numpy as np
import pytest
from agreement import agree, distance, numbers, of_workers, together
from families import tiny_family
from tiny import TINY_LLAMA

from fedray.data.shards import Shard
from fedray.errors import TrainingError

DECODER = {**TINY_LLAMA, "num_hidden_layers": 2, "max_position_embeddings": 128, "initializer_range": 0.2}
LORA = [
    "local",
    {"name": "fedavg"},
    "head_only",
    {"name": "fedalt"},
    {"name": "fedalt", "mixer": "none"},
    {"name": "fedalt", "mixer": "fixed", "alpha": 0.3},
]
MASKED = [
    {"name": "fedhft", "timing": "post", "importance": "fisher"},
    {"name": "fedhft", "timing": "post", "importance": "energy"},
    {"name": "fedhft", "timing": "pre"},
]
REFT = [
    {"name": "fedavg", "adapter": "reft"},
    {"name": "fedreft", "mixing": "adaptive"},
    {"name": "fedreft", "mixing": "fixed"},
]


MOMENTS = ("aggregated", "personalised")
IDS = ("client_000", "client_001", "client_002")


@pytest.mark.parametrize("method", [*LORA, *MASKED, *REFT], ids=str)
def test_together_is_as_one_by_one(start, method, caplog):
    """Two rounds: in the second FedALT has a rest of the world and a mixer that matters, FedReFT others to mix with.

    9, 5 and 7 examples in batches of 2, two of which make a step: 3, 2 and 2 steps an epoch, some of them short.
    """
    run = start(method, train__batch_size=2, train__accumulation=2, train__epochs=2)
    for _ in range(2):
        tasks = run.tasks(IDS, measure=True)
        alone = [run.worker.train(task) for task in tasks]
        fused = together(run.worker, tasks)
        agree(fused, alone)
        run.round()
    assert not of_workers(caplog)  # nothing fell back


@pytest.mark.parametrize("method", [{"name": "fedalt"}, {"name": "fedreft", "mixing": "adaptive"}], ids=str)
def test_a_language_model(start, method, caplog):
    """Answers of unequal length, clients that end at different steps, perplexity, dropout, no head."""
    run = start(method, task="causal_lm", model__config=DECODER, evaluation__metric="perplexity", train__batch_size=2)
    for _ in range(2):
        tasks = run.tasks(IDS, measure=True)
        agree(together(run.worker, tasks), [run.worker.train(task) for task in tasks])
        run.round()
    assert not of_workers(caplog)


@pytest.mark.parametrize(
    "generation",
    [{}, {"num_beams": 2}, {"do_sample": True, "temperature": 2.0, "repetition_penalty": 1.5}],
    ids=["greedy", "beams", "sampled"],
)
@pytest.mark.parametrize(
    "method",
    [
        {"name": "fedalt"},
        {"name": "fedreft", "mixing": "adaptive"},
        {"name": "fedavg", "adapter": "reft", "reft": {"positions": "all"}},
    ],
    ids=str,
)
def test_generated_text_is_measured_together(start, monkeypatch, caplog, method, generation):
    """Test splits of unequal size in batches of 2, by prefix and suffix of the prompt: the same texts, letter by
    letter, in as many passes as the client with the most of them takes alone."""
    run = start(
        method,
        task="causal_lm",
        model__config=DECODER,
        evaluation__metric={"class": "letters.Fingerprint"},
        evaluation__max_new_tokens=5,
        evaluation__batch_size=2,
        evaluation__generation=generation,
        train__batch_size=2,
    )
    run.round()
    tasks = [cut_test(task, number) for task, number in zip(run.tasks(IDS, measure=True), (3, 1, 4), strict=True)]
    generated, whole = [], run.worker.adapter.model.generate
    monkeypatch.setattr(run.worker.adapter.model, "generate", lambda **a: generated.append(1) or whole(**a))
    alone = [run.worker.train(task) for task in tasks]
    assert len(generated) == 2 * (2 + 1 + 2 + len(IDS)), "and one pass for each client's validation examples"
    assert len({result.report.evaluation(at).metric for result in alone for at in MOMENTS}) > 3
    generated.clear()
    agree(together(run.worker, tasks), alone)
    assert len(generated) == 2 * (2 + 1)
    assert not of_workers(caplog)


def test_text_of_a_model_that_reads_left_padding(start, tmp_path, caplog):
    """Bart's positions count padding: every client's prompts are read one by one, and a warning says so once."""
    tiny_family("bart", "causal_lm", spread=0.2).save_pretrained(tmp_path / "model")
    run = start(
        "fedavg",
        task="causal_lm",
        model={"path": str(tmp_path / "model"), "tokenizer": "bytes"},
        evaluation__metric={"class": "letters.Fingerprint"},
        evaluation__max_new_tokens=3,
    )
    tasks = run.tasks(IDS, measure=True)
    agree(together(run.worker, tasks), [run.worker.train(task) for task in tasks])
    (record,) = of_workers(caplog)
    assert record.message.startswith("tier default: texts are generated one prompt and one client at a time")


def test_what_is_generated_is_not_observed(start):
    """The mean weight of FedALT's mixer is that of the examples' own tokens, whatever is generated after them."""
    changes = {"task": "causal_lm", "model__config": DECODER}
    run, same = (
        start("fedalt", **changes, evaluation__metric=metric, evaluation__max_new_tokens=20)
        for metric in ("perplexity", "rouge_l")
    )
    for each in (run, same):
        each.round()
    found, again = (each.worker.train(each.tasks(IDS[:1], measure=True)[0]).report.recorded for each in (run, same))
    assert found["mixer_mean"] == again["mixer_mean"]


def cut_test(task, number):
    """The task with this many test examples."""
    tables = task.shard.tables
    return task._replace(shard=Shard(task.shard.client, {**tables, "test": tables["test"].slice(0, number)}))


@pytest.mark.parametrize("method", ["ifca", "fdlora", {"name": "fedreft", "mixing": "adaptive"}], ids=str)
def test_text_is_generated_for_measurements_alone(start, monkeypatch, method):
    """A method that compares losses evaluates many times in a round; text is generated before and after training, for
    test and validation examples."""
    run = start(
        method, task="causal_lm", model__config=DECODER, evaluation__metric="rouge_l", evaluation__max_new_tokens=3
    )
    run.rounds(2)
    (task, *_), generated = run.tasks(IDS, measure=True), []
    whole = run.worker.adapter.model.generate
    monkeypatch.setattr(run.worker.adapter.model, "generate", lambda **a: generated.append(1) or whole(**a))
    alone = run.worker.train(task)
    size = run.config.evaluation.batch_size
    passes = sum(-(-task.shard.num_examples(split) // size) for split in ("test", "validation"))
    assert len(generated) == 2 * passes
    generated.clear()
    agree(together(run.worker, [task, task]), [alone, alone])
    assert len(generated) == 2 * passes


def test_any_group_gives_a_client_the_same(start):
    """EngineBackend, with one other in either order, and after others that the worker's stack still holds."""
    run = start("fedalt", clients__count=5, data__groups=1)
    run.round()
    ids = [client.id for client in run.prepared.clients]
    expected = dict(zip(ids, (run.worker.train(task) for task in run.tasks(ids, measure=True)), strict=True))
    for group in (ids, ids[1:3], ids[2:0:-1], ids[::-1], ids[3:4]):
        agree(together(run.worker, run.tasks(group, measure=True)), [expected[id] for id in group])


def test_states_of_others_stay(start):
    """What goes in is never written to: neither the states of those who train, nor anybody else's."""
    run = start("fedalt")
    run.round()
    before = {id: np.concatenate(numbers(state)).copy() for id, state in run.states().items()}
    alone = run.worker.train(run.tasks(IDS[2:], measure=True)[0])
    done = together(run.worker, run.tasks(IDS[:2], measure=True))
    assert distance(done[0].state, run.state(IDS[0])) > 1e-3
    for id, state in run.states().items():
        assert np.array_equal(np.concatenate(numbers(state)), before[id])
    again = run.worker.train(run.tasks(IDS[2:], measure=True)[0])
    assert np.array_equal(np.concatenate(numbers(again)), np.concatenate(numbers(alone)))


def test_the_same_turns_give_the_same_bits(start):
    run = start("fedalt")
    first, second = (together(run.worker, run.tasks(IDS, measure=True)) for _ in range(2))
    for one, again in zip(first, second, strict=True):
        assert np.array_equal(np.concatenate(numbers(one.state)), np.concatenate(numbers(again.state)))


def test_a_method_that_fails_for_one_client_names_it(start, monkeypatch):
    run = start("fedavg")
    tasks = run.tasks(IDS, measure=True)
    sent = tasks[1].downlink
    broken = replace(sent.payload, adapter=np.full_like(sent.payload.adapter, np.nan))
    tasks[1] = tasks[1]._replace(downlink=sent._replace(payload=broken))
    threads = threading.active_count()
    with pytest.raises(ValueError, match="not finite") as caught:
        together(run.worker, tasks)
    assert caught.value.__notes__ == [f"client {IDS[1]!r}, round 1"]
    assert threading.active_count() == threads
    expected = [run.worker.train(task) for task in run.tasks(IDS, measure=True)]
    agree(together(run.worker, run.tasks(IDS, measure=True)), expected)


def test_a_loss_that_is_not_finite_names_client_and_round(start):
    run = start("fedavg", train__lr=1e30, train__clip=None)
    with pytest.raises(TrainingError, match=f"client '{IDS[0]}', round 1, step 1: the loss is not finite"):
        together(run.worker, run.tasks(IDS))


@pytest.mark.parametrize(
    ("method", "changes", "reason"),
    [
        ({"name": "fedavg", "adapter": "full"}, {}, "the whole model trains"),
        ("fedavg", {"clients__tiers": {"all": {"share": 1.0, "engine": "deepspeed"}}}, "not plain torch"),
    ],
    ids=["full", "deepspeed"],
)
def test_what_cannot_be_fused_is_trained_one_by_one_and_said_once(start, method, changes, reason, caplog):
    run = start(method, **changes)
    tasks = run.tasks(IDS, measure=True)
    alone = [run.worker.train(task) for task in tasks]
    agree(together(run.worker, tasks), alone)
    agree(together(run.worker, tasks), alone)
    (record,) = of_workers(caplog)
    assert "one by one" in record.getMessage()
    assert reason in record.getMessage()


def test_checkpointed_activations(start):
    tiers = {"all": {"share": 1.0, "activation_checkpointing": True}}
    run = start("fedalt", task="causal_lm", model__config=DECODER, clients__tiers=tiers)
    tasks = run.tasks(IDS, measure=True)
    agree(together(run.worker, tasks), [run.worker.train(task) for task in tasks])


def test_tiers_with_other_ranks(start):
    tiers = {"weak": {"clients": list(IDS[:2]), "lora_rank": 1}, "rest": {"share": 1.0}}
    run = start("fedavg", clients__tiers=tiers)
    tasks = run.tasks(IDS[:2], measure=True)
    worker = run.pool.workers["weak"]
    agree(together(worker, tasks), [worker.train(task) for task in tasks])


def test_widths_that_cut_an_actors_clients_into_equal_parts_are_tried(start, monkeypatch):
    """Of four clients in groups of 1, 2, 4, 8 and 16, and of 4/1, 4/2 and 4/3 rounded up."""
    run, tried = start("fedavg", clients__count=4), []
    monkeypatch.setattr(
        "fedray.federation.worker.width_seconds",
        lambda serve, number, widths: tried.append((number, widths)) or {1: 1.0},
    )
    ids = [client.id for client in run.prepared.clients]
    run.worker.width_seconds(run.tasks(ids, measure=True))
    run.worker.width_seconds(run.tasks(ids[:3], measure=True))
    assert tried == [(4, [1, 2, 4, 8, 16]), (3, [1, 2, 3, 4, 8, 16])]


def test_timing_widths_leaves_nothing_behind(start):
    run = start("fedalt", train__epochs=5)
    tasks, training_context = run.tasks(IDS, measure=True), run.worker.training_context
    expected = [run.worker.train(task) for task in tasks]
    seconds = run.worker.width_seconds(tasks)
    assert set(seconds) == {1, 2, 3}
    assert min(seconds.values()) > 0
    assert run.worker.training_context == training_context
    for task, before in zip(tasks, expected, strict=True):
        after = run.worker.train(task)
        assert after.report.steps == before.report.steps
        assert np.array_equal(np.concatenate(numbers(after.state)), np.concatenate(numbers(before.state)))


def test_what_cannot_be_fused_has_width_one(start):
    run = start({"name": "fedavg", "adapter": "full"})
    assert set(run.worker.width_seconds(run.tasks(IDS, measure=True))) == {1}


@pytest.mark.parametrize("timing", ["pre", "post"])
def test_every_client_has_its_own_mask(start, timing):
    """Half of the rows, drawn per client in round 0 and by energy later."""
    run = start({"name": "fedhft", "timing": timing}, clients__tiers={"half": {"share": 1.0, "mask_ratio": 0.5}})
    for _ in range(2):
        tasks = run.tasks(IDS, measure=True)
        alone = [run.worker.train(task) for task in tasks]
        masks = [np.concatenate(numbers(result.payload.masks)) for result in alone]
        assert not np.array_equal(masks[0], masks[1])
        fused = together(run.worker, tasks)
        agree(fused, alone)
        for mask, result in zip(masks, fused, strict=True):
            assert np.array_equal(np.concatenate(numbers(result.payload.masks)), mask)
        run.round()


def test_mixers_of_clients_with_unequal_test_examples(start):
    """Rows that only fill up a pass count in nobody's mean of the mixer: two examples and a copy of the first have
    another mean than the two."""
    run = start("fedalt", evaluation__batch_size=4)
    tasks = run.tasks(IDS, measure=True)
    for place, keep in enumerate([3, 1, 2]):
        shard = tasks[place].shard
        tables = {**shard.tables, "test": shard.tables["test"].slice(0, keep)}
        tasks[place] = tasks[place]._replace(shard=Shard(shard.client, tables))
        assert tables["test"].num_rows == keep
    alone = [run.worker.train(task) for task in tasks]
    agree(together(run.worker, tasks), alone)
    assert len({result.report.recorded["mixer_mean"] for result in alone}) == 3


@pytest.mark.parametrize(
    ("mixer", "train"),
    [
        ("none", "lora rest head"),
        ("scalars", "lora mixer.w_R head"),
        ("experts", "lora mixer.G head"),
        ("similarity", "rest head"),
        ("core", "core head"),
    ],
)
def test_branches_of_every_weight(start, caplog, mixer, train):
    """Clients of 9, 5 and 7 examples, dropout, and another number of experts for every client and target."""
    run = start({"class": "weighed.Weighed", "mixer": mixer, "trained": train}, train__batch_size=2)
    tasks = run.tasks(IDS, measure=True)
    alone = [run.worker.train(task) for task in tasks]
    agree(together(run.worker, tasks), alone)
    assert not of_workers(caplog)
    moved = [result.payload.vectors[train.split()[0]] for result in alone]
    assert not np.allclose(moved[0], moved[1], atol=1e-2)


@pytest.mark.parametrize("metric", ["perplexity", "rouge_l"])
def test_similarity_in_a_language_model(start, metric):
    """Answers of unequal length, and generated ones."""
    run = start(
        {"class": "weighed.Weighed", "mixer": "similarity", "trained": "lora rest"},
        task="causal_lm",
        model__config=DECODER,
        evaluation__metric=metric,
        evaluation__max_new_tokens=3,
        train__batch_size=2,
    )
    tasks = run.tasks(IDS, measure=True)
    agree(together(run.worker, tasks), [run.worker.train(task) for task in tasks])
