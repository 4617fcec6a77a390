"""Batched clients against the same clients trained one by one, and what must not happen between members."""

import threading

import numpy as np
import pytest
import torch
from members import CLIENTS, alone, compare, first_values, fused, one_round
from transformers import AutoConfig, AutoModelForSequenceClassification

from fedray.adapters.client_batch import CannotBatch
from fedray.adapters.full import attach_full
from fedray.adapters.lora import attach_lora
from fedray.adapters.reft import attach_reft
from fedray.adapters.stacked import AdapterStack
from fedray.config import LoraSection, ModelConfig, ReftSection
from fedray.errors import TrainingError
from fedray.models.architecture import architecture
from fedray.models.build import build
from fedray.training.batched import join, run_batched

TASKS = ["classification", "regression", "causal_lm"]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "train",
    [
        {"batch_size": 2, "accumulation": 2, "epochs": 2, "schedule": "linear", "weight_decay": 0.1, "clip": 0.1},
        {"batch_size": 3, "optimizer": "sgd", "momentum": 0.5, "weight_decay": 0.1, "max_steps": 4, "epochs": 3},
    ],
    ids=["adamw", "sgd"],
)
def test_batched_clients_are_as_alone(adapt, locals_of, task, train):
    """Dropout acts, members end at different steps, last batches are short, dee has a single example."""
    adapter = adapt(task, dropout=0.3)
    locals_ = locals_of(adapter, task, measure=True, server_round=2, lr=0.01, round_decay=0.9, **train)
    values = {name: first_values(adapter, name) for name in locals_}
    expected = alone(adapter, locals_, values)
    compare(fused(adapter, locals_, values), expected, values)
    assert len({report.steps for _, report in expected.values()}) > 1


@pytest.mark.parametrize(
    "train",
    [
        {"schedule": "cosine", "schedule_over": "run", "warmup_steps": 0.4, "min_lr": 0.002},
        {"schedule": "linear", "warmup_steps": 1, "round_schedule": "cosine", "warmup_rounds": 1},
    ],
    ids=["over the run", "over rounds"],
)
def test_every_member_has_the_rates_of_its_own_steps(adapt, locals_of, train):
    """Members of 6, 2, 5 and 1 steps: one warm-up over the run ends in another step of each."""
    adapter = adapt()
    locals_ = locals_of(adapter, batch_size=2, lr=0.02, head_lr=0.05, server_round=1, rounds=3, **train)
    values = {name: first_values(adapter, name) for name in locals_}
    if train["schedule"] == "linear":
        del locals_["dee"]  # a single step, whose rate is 0
    compare(fused(adapter, locals_, values), alone(adapter, locals_, values), values)


@pytest.mark.parametrize("family", ["bert", "roberta", "llama", "gpt_neox", "qwen2"])
def test_every_family(family, locals_of):
    """RoBERTa has two layers in its head and counts positions behind padding; decoders pool the last token.

    A larger eps, because Adam turns the rounding of a gradient near 1e-8 into a step.
    """
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    fields = {"vocab_size": 40, "max_position_embeddings": 40, "pad_token_id": 0, "num_labels": 3, **sizes}
    fields |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if "bert" in family else {}
    fields |= {"num_key_value_heads": 1} if family in ("llama", "qwen2") else {}
    config = AutoConfig.for_model(family, **fields)
    config.initializer_range = 0.2
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    adapter = attach_lora(model, LoraSection(rank=2), rest_rank=3, mixer="adaptive")
    locals_ = locals_of(adapter, measure=True, batch_size=2, lr=0.01, eps=1e-4)
    values = {name: first_values(adapter, name) for name in locals_}
    compare(fused(adapter, locals_, values), alone(adapter, locals_, values), values)


@pytest.mark.parametrize(
    ("family", "pooling"), [("bert", "mean"), ("roberta", "cls"), ("llama", "last"), ("cohere", None)]
)
def test_classifiers_with_another_pooling(family, pooling, locals_of):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    fields = {"vocab_size": 40, "max_position_embeddings": 40, "initializer_range": 0.2, **sizes}
    section = ModelConfig(path="random", tokenizer="bytes", config={"model_type": family, **fields}, pooling=pooling)
    torch.manual_seed(3)
    model = build(architecture(section, "classification", 3, None, 0), "classification").eval()
    adapter = attach_lora(model, LoraSection(rank=2))
    locals_ = locals_of(adapter, measure=True, batch_size=2, lr=0.01, eps=1e-4)
    values = {name: first_values(adapter, name) for name in locals_}
    compare(fused(adapter, locals_, values), alone(adapter, locals_, values), values)


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
@pytest.mark.parametrize("kind", ["loreft", "noreft", "direft", "nodireft"])
@pytest.mark.parametrize("positions", ["f1+l1", "f2+l3", "all"])
def test_interventions(backbone, locals_of, task, kind, positions):
    """With batches of one example and prompts of one token, a step may edit no token with the suffix's intervention:
    its moments and step count must then stay, on that member only."""
    section = ReftSection(rank=2, kind=kind, positions=positions, dropout=0.2)
    adapter = attach_reft(backbone(task), section, seed=1)
    locals_ = locals_of(adapter, task, measure=True, batch_size=1, lr=0.01, weight_decay=0.1)
    values = {name: first_values(adapter, name) for name in locals_}
    compare(fused(adapter, locals_, values), alone(adapter, locals_, values), values)


@pytest.mark.parametrize("positions", ["f1+l1", "all"])
def test_interventions_with_relative_rotations(backbone, locals_of, positions):
    """Every member has loaded another R."""
    section = ReftSection(rank=2, positions=positions, rotation="relative", dropout=0.2)
    adapter = attach_reft(backbone("classification"), section, seed=1)
    locals_ = locals_of(adapter, measure=True, batch_size=2, lr=0.01, weight_decay=0.1)
    values = {name: first_values(adapter, name) for name in locals_}
    compare(fused(adapter, locals_, values), alone(adapter, locals_, values), values)


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_interventions_with_short_batches(backbone, locals_of, task):
    """Steps end with fewer micro-batches, and these with fewer examples, than those of other members."""
    adapter = attach_reft(backbone(task), ReftSection(rank=2, positions="f1+l2", dropout=0.3), seed=1)
    locals_ = locals_of(adapter, task, measure=True, batch_size=4, accumulation=2, lr=0.01)
    values = {name: first_values(adapter, name) for name in locals_}
    compare(fused(adapter, locals_, values), alone(adapter, locals_, values), values)


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
@pytest.mark.parametrize("tied", [False, True])
def test_interventions_on_halves_of_short_prompts(backbone, locals_of, task, tied):
    """With batches of one example, members edit 0 to 4 tokens at either end; where all edit none, as in prompts of one
    token, a step has no gradient at all."""
    section = ReftSection(rank=2, positions="f4+l4", tie_positions=tied, short_prompts="halves", dropout=0.2)
    adapter = attach_reft(backbone(task), section, seed=1)
    locals_ = locals_of(adapter, task, measure=True, batch_size=1, lr=0.01, weight_decay=0.1)
    values = {name: first_values(adapter, name) for name in locals_}
    compare(fused(adapter, locals_, values), alone(adapter, locals_, values), values)


def test_rows_that_fill_up_are_copies_without_answers():
    """Members of 1, 0 and 2 rows: attention over nothing is never asked of a model."""

    def part(ids, labels):
        tokens = torch.tensor(ids, dtype=torch.long).reshape(len(ids), -1)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": torch.tensor(labels)}

    none = {name: tensor[:0] for name, tensor in part([[1, 2]], [[-100, 2]]).items()}
    parts = [part([[5, 6, 7]], [[-100, 6, 7]]), none, part([[8, 9], [3, 4]], [[-100, 9], [-100, 4]])]
    joined = join(parts, "causal_lm", 0)
    five, none_ = [5, 6, 7], [-100] * 3
    assert joined.batch["input_ids"].tolist() == [five, five, five, five, [8, 9, 0], [3, 4, 0]]
    assert joined.batch["attention_mask"].tolist() == [[1, 1, 1]] * 4 + [[1, 1, 0]] * 2
    assert joined.batch["labels"].tolist() == [[-100, 6, 7], none_, none_, none_, [-100, 9, -100], [-100, 4, -100]]
    assert joined.shapes == ((1, 3), (0, 2), (2, 2))
    weights, members = joined.weights([2, 1, 2])
    assert weights.tolist() == [0.5] * 4
    assert members.tolist() == [0, 0, 2, 2]
    assert [own.tolist() for own in joined.own_units("cpu")] == [[0, 1], [], [2, 3]]


def test_a_class_in_a_row_that_fills_up_weighs_nothing():
    tokens = torch.tensor([[3, 4], [5, 6]])
    parts = [
        {
            "input_ids": tokens[:number],
            "attention_mask": tokens[:number] * 0 + 1,
            "labels": torch.tensor([2, 1])[:number],
        }
        for number in (1, 2)
    ]
    joined = join(parts, "classification", 0)
    assert joined.batch["labels"].tolist() == [2, 2, 2, 1]
    assert joined.weights([1, 4])[0].tolist() == [1, 0, 0.25, 0.25]
    assert [own.tolist() for own in joined.own_units("cpu")] == [[0], [2, 3]]


@pytest.mark.parametrize("names", [["dee", "cid", "bob", "ann"], ["bob", "ann"], ["cid"]], ids=len)
def test_neither_order_nor_width_matter(adapt, locals_of, names):
    adapter = adapt(dropout=0.3)
    locals_ = locals_of(adapter, measure=True, batch_size=2)
    values = {name: first_values(adapter, name) for name in locals_}
    expected = alone(adapter, locals_, values)
    chosen = {name: locals_of(adapter, measure=True, batch_size=2)[name] for name in names}
    compare(fused(adapter, chosen, values, members=5), {name: expected[name] for name in names}, values)


def test_the_base_model_is_passed_once_for_all(adapt, locals_of):
    adapter, seen = adapt(), []
    locals_ = locals_of(adapter, clients={"ann": 6, "bob": 6, "cid": 6}, batch_size=2)
    adapter.model.register_forward_hook(lambda *_: seen.append(1))
    fused(adapter, locals_, {name: first_values(adapter, name) for name in locals_})
    assert len(seen) == 3


def test_the_adapter_itself_is_as_before(adapt, locals_of, batch_of):
    """Its values, what computes with them, and the members that nobody used."""
    adapter = adapt(dropout=0.3)
    adapter.model.eval()
    before = {name: adapter.read(name) for name in adapter.names}
    logits = adapter.model(**batch_of).logits
    stack = AdapterStack(adapter, 3)
    locals_ = locals_of(adapter, clients={"ann": 6})
    run_batched(
        stack,
        locals_["ann"]._training_context,
        1.0,
        [lambda member: one_round(member, locals_["ann"], first_values(adapter, "ann"))],
    )
    assert all(np.array_equal(adapter.read(name), vector) for name, vector in before.items())
    assert torch.equal(adapter.model(**batch_of).logits, logits)
    assert torch.equal(stack.values[1], stack.values[2])
    assert not torch.equal(stack.values[0], stack.values[1])
    assert np.array_equal(stack.member(2).read("lora"), before["lora"])


@pytest.fixture
def batch_of():
    return {"input_ids": torch.tensor([[3, 4, 5]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}


@pytest.mark.parametrize("bad", ["ann", "cid"])
def test_a_member_that_is_not_finite_names_its_client(adapt, locals_of, bad):
    """Its values make the first loss infinite; the other members' threads end, too."""
    adapter = adapt()
    locals_ = locals_of(adapter)
    values = {name: first_values(adapter, name) for name in locals_}
    values[bad]["head"][:] = 1e38
    values[bad]["lora"][:] = 1e30
    threads = threading.active_count()
    with pytest.raises(TrainingError, match=rf"client '{bad}', round 1, step 0: the loss is not finite"):
        fused(adapter, locals_, values)
    assert threading.active_count() == threads
    good = {name: local for name, local in locals_of(adapter).items() if name != bad}
    compare(fused(adapter, good, values), alone(adapter, locals_of(adapter), {**values, bad: values["bob"]}), values)


def test_what_is_not_finite_stays_with_its_member(adapt, locals_of, monkeypatch):
    """Without the check, ann's NaN would show in bob's values if anything mixed members."""
    monkeypatch.setattr("fedray.training.loop.check_finite", lambda *_: None)
    adapter = adapt(dropout=0.2)
    locals_ = locals_of(adapter)
    values = {name: first_values(adapter, name) for name in locals_}
    expected = alone(adapter, locals_of(adapter), values)
    values["ann"]["head"][:] = 1e38
    found = fused(adapter, locals_, values)
    assert not np.isfinite(found["ann"][0]).all()
    others = {name: result for name, result in found.items() if name != "ann"}
    compare(others, expected, values)


def test_interventions_keep_what_is_not_finite_with_its_member(backbone, locals_of, monkeypatch):
    """`all` edits unequally many tokens per member, so that the shorter ones are filled up."""
    monkeypatch.setattr("fedray.training.loop.check_finite", lambda *_: None)
    adapter = attach_reft(backbone("classification"), ReftSection(rank=2, kind="nodireft", positions="all"), seed=1)
    values = {name: first_values(adapter, name) for name in CLIENTS}
    expected = alone(adapter, locals_of(adapter, batch_size=1), values)
    values["ann"]["reft"][:] = 1e30
    found = fused(adapter, locals_of(adapter, batch_size=1), values)
    assert not np.isfinite(found["ann"][0]).all()
    compare({name: result for name, result in found.items() if name != "ann"}, expected, values)


def test_a_client_without_examples_is_named(adapt, locals_of):
    adapter = adapt()
    locals_ = locals_of(adapter, clients={"ann": 4, "bob": 0})
    with pytest.raises(TrainingError, match="'bob' has no training examples"):
        fused(adapter, locals_, {name: first_values(adapter, name) for name in locals_})


def test_rows_are_a_members_own(adapt):
    """Rows 1, 2 exist; on member 1 row 5 comes instead of row 1: it is zero, and row 2 stays."""
    adapter = adapt()
    adapter.set_rows({path: np.array([1, 2]) for path in adapter.targets})
    stack = AdapterStack(adapter, 2)
    path = next(iter(adapter.targets))
    kept = adapter.layout("lora").views(adapter.read("lora"))[f"{path}.B"]
    stack.member(1).set_rows({path: np.array([2, 5]) for path in adapter.targets})
    first, second = (stack.member(index).tensors()[f"lora.{path}.B"] for index in (0, 1))
    np.testing.assert_array_equal(first[[1, 2]], kept)
    np.testing.assert_array_equal(second[[2, 5]], [kept[1], 0 * kept[1]])
    assert np.count_nonzero(first.any(1)) == 2
    assert np.count_nonzero(second.any(1)) == 1
    assert kept.all()
    with pytest.raises(CannotBatch, match="another number of rows"):
        stack.member(0).set_rows({path: np.array([3]) for path in adapter.targets})


def test_importance_of_batched_clients_is_as_alone(adapt, locals_of):
    """Batched clients with unequal examples, the last batches short."""
    adapter = adapt("causal_lm")
    locals_ = locals_of(adapter, "causal_lm", batch_size=2)
    values = {name: first_values(adapter, name) for name in locals_}

    def importance(work, name):
        for group, vector in values[name].items():
            work.adapter.load(group, vector)
        return work.importance(locals_[name]._shard.tables["train"])

    alone = {name: importance(local._backend, name) for name, local in locals_.items()}
    pieces = [lambda member, name=name: importance(member, name) for name in locals_]
    found = run_batched(AdapterStack(adapter, 4), locals_["ann"]._training_context, 1.0, pieces)
    for name, fisher in zip(locals_, found, strict=True):
        assert fisher.keys() == alone[name].keys()
        for path, values_ in fisher.items():
            assert np.linalg.norm(values_ - alone[name][path]) < 1e-5 * np.linalg.norm(alone[name][path])
            assert values_.any()


def test_a_member_reads_back_what_it_was_given(adapt):
    stack = AdapterStack(adapt(), 3)
    members = [stack.member(index) for index in range(3)]
    vectors = [np.random.default_rng(index).normal(size=members[0].layout("lora").size) for index in range(3)]
    for member, vector in zip(members, vectors, strict=True):
        member.load("lora", vector.astype(np.float32))
    for member, vector in zip(members, vectors, strict=True):
        assert np.array_equal(member.read("lora"), vector.astype(np.float32))
        assert member.num_trainable() == stack.adapter.num_trainable()
    with pytest.raises(ValueError, match="not finite"):
        members[0].load("lora", np.full(members[0].layout("lora").size, np.nan, np.float32))


def test_the_whole_model_cannot_be_stacked(backbone):
    with pytest.raises(CannotBatch, match="whole model"):
        AdapterStack(attach_full(backbone("classification")), 2)


def test_a_head_with_a_normalisation_layer_cannot_be_stacked(backbone):
    model = backbone("classification")
    model.norm = torch.nn.LayerNorm(16)
    with pytest.raises(CannotBatch, match="norm.weight"):
        AdapterStack(attach_lora(model, LoraSection(rank=2)), 2)
