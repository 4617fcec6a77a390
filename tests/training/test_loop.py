"""The loop against plain torch, and what must not change its bits."""

import math
from itertools import islice

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils import parametrize

from fedray.adapters.reft import attach_reft
from fedray.config import ReftSection, TrainConfig
from fedray.errors import TrainingError
from fedray.randomness import keyed_rng
from fedray.training.loop import Train, grouped_by_length, steps, total_steps
from fedray.training.process_group import SINGLE_PROCESS

TASKS = ["classification", "regression", "causal_lm"]


def values(adapter):
    return np.concatenate([adapter.read(name) for name in adapter.names])


def trained(adapter, local):
    local.train()
    return values(adapter)


def padded(rows):
    """A batch as transformers wants it, made here without the data floor."""
    width = max(len(row["input_ids"]) for row in rows)

    def pad(tokens, filler):
        return [*tokens, *[filler] * (width - len(tokens))]

    labels = [row["labels"] for row in rows]
    return {
        "input_ids": torch.tensor([pad(row["input_ids"], 0) for row in rows]),
        "attention_mask": torch.tensor([pad([1] * len(row["input_ids"]), 0) for row in rows]),
        "labels": torch.tensor([pad(one, -100) for one in labels] if isinstance(labels[0], list) else labels),
    }


def reference(adapter, rows, client, epochs, batch_size, lr, clip, head_lr):
    """A loop over large batches with transformers' own loss, torch.autograd, and Adam written out."""
    adapter.model.train()
    parameters = [(p, head_lr if g.name == "head" else lr) for g in adapter.trainable_groups() for p in g.parameters]
    m, v = ([torch.zeros_like(p) for p, _ in parameters] for _ in range(2))
    losses = []
    for epoch in range(epochs):
        order = keyed_rng(3, "order", 0, client, epoch).permutation(len(rows))
        for start in range(0, len(rows), batch_size):
            loss = adapter.model(**padded([rows[i] for i in order[start : start + batch_size]])).loss
            grads = torch.autograd.grad(loss, [p for p, _ in parameters])
            norm = math.sqrt(sum(g.square().sum().item() for g in grads))
            losses.append(loss.item())
            with torch.no_grad():
                for i, ((p, rate), g) in enumerate(zip(parameters, grads, strict=True)):
                    g = g * min(1.0, clip / norm)
                    m[i] = 0.9 * m[i] + 0.1 * g
                    v[i] = 0.99 * v[i] + 0.01 * g * g
                    m_hat, v_hat = m[i] / (1 - 0.9 ** len(losses)), v[i] / (1 - 0.99 ** len(losses))
                    p -= rate * m_hat / (v_hat.sqrt() + 1e-4)
    return values(adapter), losses


@pytest.mark.parametrize("task", TASKS)
def test_training_is_a_plain_loop(adapt, trainer, examples, task):
    """11 examples in batches of 4, twice: 6 steps, two of them on 3 examples."""
    head_lr = {} if task == "causal_lm" else {"head_lr": 0.02}
    adapter = adapt(task)
    before = values(adapter)
    local = trainer(adapter, task, epochs=2, lr=0.01, clip=0.5, betas=(0.9, 0.99), eps=1e-4, **head_lr)
    ours = trained(adapter, local)
    rows = examples(task, 11, sum(map(ord, "ann"))).to_pylist()
    expected, losses = reference(adapt(task), rows, "ann", 2, 4, 0.01, 0.5, 0.02)
    assert np.abs(ours - before).max() > 0.01
    np.testing.assert_allclose(ours, expected, atol=2e-6)
    assert local.report.steps == 6
    assert local.report.train_loss == pytest.approx(np.mean(losses), rel=1e-6)


@pytest.mark.parametrize("task", TASKS)
def test_accumulation_is_one_large_batch(adapt, trainer, task):
    """15 examples: steps of 4 + 4 and of 4 + 3, which an average of micro-batch means would weigh wrongly."""
    results = []
    for batch_size, accumulation in [(8, 1), (4, 2), (3, 3)]:
        adapter = adapt(task)
        train = {"optimizer": "sgd", "lr": 0.05, "momentum": 0.5, "epochs": 2}
        local = trainer(adapter, task, num_examples=15, batch_size=batch_size, accumulation=accumulation, **train)
        results.append((trained(adapter, local), local.report.train_loss, local.report.steps))
    large, halves, thirds = results
    np.testing.assert_allclose(halves[0], large[0], atol=1e-6)
    assert halves[1] == pytest.approx(large[1], abs=1e-6)
    assert halves[2] == large[2] == 4
    assert np.abs(thirds[0] - large[0]).max() > 1e-4  # steps of 9 and 6 are another training


def test_who_trained_before_does_not_matter(adapt, trainer, restart):
    adapter = adapt(dropout=0.2)
    head = adapter.read("head")
    alone = trained(adapter, trainer(adapter, client="bob", epochs=2))
    restart(adapter, head)
    ann = trained(adapter, trainer(adapter, client="ann", epochs=3, server_round=1, measure=True))
    restart(adapter, head)
    after_ann = trained(adapter, trainer(adapter, client="bob", epochs=2, measure=True))
    assert np.array_equal(alone, after_ann)
    assert not np.array_equal(alone, ann)


@pytest.mark.parametrize("task", TASKS)
def test_two_runs_give_the_same_bits(adapt, trainer, task):
    first, second = (adapt(task, dropout=0.3) for _ in range(2))
    assert np.array_equal(trained(first, trainer(first, task)), trained(second, trainer(second, task)))


@pytest.mark.parametrize(
    ("train", "share"),
    [
        ({"schedule": "linear", "schedule_over": "run"}, 2 / 3),  # step 4 of 12
        ({"schedule": "cosine", "schedule_over": "run", "warmup_steps": 5}, 4 / 5),
        ({"schedule": "linear"}, 1),  # starts afresh in every round
        ({"round_schedule": "cosine"}, 3 / 4),  # (1 + cos(π/3)) / 2
        ({"round_schedule": "linear", "warmup_rounds": 2}, 2 / 3),
        ({"schedule": "linear", "schedule_over": "run", "min_lr": 0.01}, 11 / 15),  # (2 · 5 + 1) / 3 fifths of lr
    ],
)
def test_the_rate_of_a_step(adapt, trainer, train, share):
    """Round 1 of 3, of which one step is trained: four steps a round, so it is step 4 of 12 in the run. With plain SGD
    it moves by its share of what the constant rate moves by."""
    moved = []
    for fields in ({}, train):
        adapter = adapt()
        before = values(adapter)
        local = trainer(
            adapter, num_examples=16, server_round=1, rounds=3, optimizer="sgd", clip=None, max_steps=4, **fields
        )
        moved.append(one_step(local, adapter) - before)
    assert np.linalg.norm(moved[0]) > 0.01
    np.testing.assert_allclose(moved[1], share * moved[0], atol=1e-6)


def one_step(local, adapter):
    """The values after the first step of a training, which goes on."""
    engine, found = local._backend.engine, []
    step = engine.step

    def first():
        step()
        found.append(values(adapter))

    engine.step = first
    local.train()
    return found[0]


@pytest.mark.parametrize("other", [{"seed": 4}, {"server_round": 1}])
def test_seed_and_round_key_the_order(adapt, trainer, other):
    first, second = adapt(), adapt()
    assert not np.array_equal(trained(first, trainer(first)), trained(second, trainer(second, **other)))


def test_dropout_is_keyed_by_seed_round_client_step_and_micro_batch(adapt, trainer):
    adapter = adapt(dropout=0.5)
    keys = []
    adapter.set_dropout_key = keys.append
    trainer(adapter, accumulation=2, epochs=1).train()  # 11 examples: micro-batches (0, 0), (0, 1), (1, 0)
    trainer(adapter, server_round=1).train()
    trainer(adapter, client="bob").train()
    trainer(adapter, seed=4).train()
    assert len(keys) == len(set(keys)) == 12
    again = []
    adapter.set_dropout_key = again.append
    trainer(adapter, accumulation=2, epochs=1).train()
    assert again == keys[:3]


def test_dropout_acts_in_training_and_leaves_the_global_generator_alone(adapt, trainer):
    with_dropout, without = adapt(dropout=0.5), adapt()
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = trained(with_dropout, trainer(with_dropout, measure=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert not np.array_equal(first, trained(without, trainer(without)))
    torch.manual_seed(12)
    repeated = adapt(dropout=0.5)
    torch.manual_seed(13)
    assert np.array_equal(first, trained(repeated, trainer(repeated)))


def test_loreft_stays_orthonormal_under_weight_decay(backbone, trainer):
    """Decay on the raw rotation would turn R into zeros; accumulation needs its parametrization anew each time."""
    adapter = attach_reft(backbone("classification"), ReftSection(rank=2), seed=1)
    before = adapter.read("reft")
    trainer(adapter, weight_decay=0.1, epochs=3, accumulation=2, batch_size=2).train()
    after = adapter.layout("reft").views(adapter.read("reft"))
    rotations = [view for name, view in after.items() if name.endswith(".R")]
    assert len(rotations) == 4  # two blocks, prefix and suffix
    for rotation in rotations:
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(2), atol=1e-5)
    assert np.abs(adapter.read("reft") - before).max() > 0.01


def test_rotations_are_computed_once_per_micro_batch(backbone, trainer):
    """pyreft reads R twice per forward pass, and computing it is most of an intervention's cost."""
    adapter = attach_reft(backbone("classification"), ReftSection(rank=2, layers=(0,), positions="l1"), seed=1)
    (rotate_layer,) = (module for module in adapter.model.modules() if parametrize.is_parametrized(module))
    calls = []
    rotate_layer.parametrizations.weight[0].register_forward_hook(lambda *_: calls.append(1))
    trainer(adapter, num_examples=6, batch_size=2, max_steps=3).train()
    assert len(calls) == 3


def test_interventions_of_a_language_model_end_at_its_prompt(backbone, trainer, examples):
    """`l1` edits the prompt's last token, which only the labels tell: transformers' own loss sees the same."""
    adapter = attach_reft(backbone("causal_lm"), ReftSection(rank=2, positions="l1"), seed=1)
    local = trainer(adapter, "causal_lm", num_examples=4, optimizer="sgd", lr=1e-9)
    expected = adapter.model(**padded(examples("causal_lm", 4, sum(map(ord, "ann"))).to_pylist())).loss.item()
    local.train()
    assert local.report.train_loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("num_examples", "train", "steps"),
    [
        (11, {"batch_size": 4}, 3),  # 4 + 4 + 3
        (11, {"batch_size": 4, "accumulation": 2}, 2),  # (4 + 4) + 3
        (11, {"batch_size": 4, "epochs": 2.5}, 8),  # 7.5, rounded up
        (50, {"batch_size": 1, "epochs": 1.1}, 55),  # 1.1 · 50 is 55.00000000000001 in floats
        (2, {"batch_size": 8, "epochs": 0.01}, 1),
        (100, {"batch_size": 1, "max_steps": 7}, 7),
        (3, {"batch_size": 1, "max_steps": 7}, 3),
    ],
)
def test_number_of_steps(num_examples, train, steps):
    assert total_steps(num_examples, TrainConfig(**train)) == steps


@given(st.lists(st.integers(1, 60), max_size=90), st.integers(1, 6), st.integers(0, 9))
def test_grouping_by_length_keeps_all_rows_and_pads_no_more(sizes, step, seed):
    """Every row once; full steps first. In runs of eight steps, sorted pieces have the least sum of longest rows."""
    sizes, rng = np.array(sizes, np.int64), np.random.default_rng(seed)
    order = rng.permutation(len(sizes))
    found = grouped_by_length(order, sizes, step, rng)
    assert sorted(found) == list(range(len(sizes)))

    def longest(rows):
        return sum(max(sizes[rows[start : start + step]]) for start in range(0, len(rows), step))

    assert longest(found) <= longest(order)


def test_grouping_by_length_changes_the_batches_and_nothing_else(adapt, trainer, examples):
    """Six examples of two lengths in steps of three: the long ones train together, whichever comes first."""
    rows = examples("classification", 6, 1)
    ids = [[5] * (12 if index % 2 else 3) for index in range(6)]
    table = rows.set_column(rows.column_names.index("input_ids"), "input_ids", pa.array(ids, pa.list_(pa.int32())))
    training_context = trainer(adapt("classification"), batch_size=3, group_by_length=True)._training_context
    for server_round in range(4):
        two = [
            next(iter(step.micro_batches.values()))
            for step in islice(steps(Train(table, "ann", server_round), training_context, SINGLE_PROCESS), 2)
        ]
        assert sorted(batch["input_ids"].shape for batch in two) == [(3, 3), (3, 12)]


def test_max_steps_ends_a_round(adapt, trainer):
    adapter = adapt()
    local = trainer(adapter, epochs=10, max_steps=5)
    local.train()
    assert local.report.steps == 5


def test_a_loss_that_is_not_finite_names_client_round_step_and_rate(adapt, trainer):
    """The first step moves every value by about 1e30, which the second forward pass cannot bear."""
    adapter = adapt()
    with pytest.raises(TrainingError, match=r"'ann', round 8, step 1: the loss is not finite \(learning rate 1e\+30\)"):
        trainer(adapter, server_round=7, lr=1e30).train()


def test_a_finite_loss_with_values_that_are_not_is_an_error_too(adapt, trainer):
    """The only step's loss is finite, but its update is beyond float32."""
    adapter = adapt()
    with pytest.raises(TrainingError, match="step 0: the loss is finite, but the trained values are not"):
        trainer(adapter, max_steps=1, lr=1e39).train()


def test_a_long_round_fails_soon_after_its_first_bad_step(adapt, trainer, monkeypatch):
    monkeypatch.setattr("fedray.training.loop.CHECK_EVERY", 3)
    adapter, seen = adapt(), []
    adapter.model.register_forward_hook(lambda *_: seen.append(1))
    with pytest.raises(TrainingError, match="step 1:"):
        trainer(adapter, lr=1e30, epochs=100).train()
    assert len(seen) == 3


def test_examples_without_answer_tokens_are_an_error(adapt, trainer):
    adapter = adapt("causal_lm")
    local = trainer(adapter, "causal_lm", num_examples=2)
    lists = pa.list_(pa.int32())
    rows = pa.table({"input_ids": pa.array([[3, 4]] * 2, lists), "labels": pa.array([[-100, -100]] * 2, lists)})
    local._shard.tables["train"] = rows
    with pytest.raises(TrainingError, match="no answer tokens"):
        local.train()
