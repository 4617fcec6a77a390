"""What is known before an actor starts: the clients and their tiers, and every mistake as one ConfigError."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from fedray.config import ClientsConfig, load_config
from fedray.data.shards import Shard
from fedray.errors import ConfigError, DataError
from fedray.evaluation.metrics.f1 import F1
from fedray.experiment.outline import costs_from_configuration
from fedray.experiment.population import make_clients
from fedray.experiment.prepare import Prepared, prepare
from fedray.types import Client

# ---------------------------------------------------------------- clients and tiers


def shard(client: str, examples: int) -> Shard:
    table = pa.table({"input_ids": [[1]] * examples, "labels": [0] * examples})
    return Shard(client, {"train": table, "validation": table.slice(0, 0), "test": table.slice(0, 1)})


def deal(count: int, tiers: Mapping[str, Any], seed: int = 0) -> tuple[Client, ...]:
    shards = {f"c{number:02d}": shard(f"c{number:02d}", number + 1) for number in reversed(range(count))}
    return make_clients(ClientsConfig(tiers=dict(tiers)), shards, seed)


def share(*shares: float) -> dict[str, Any]:
    return {name: {"share": part} for name, part in zip("abc", shares, strict=False)}


@pytest.mark.parametrize(
    ("count", "shares", "sizes"),
    [
        (10, (0.5, 0.3, 0.2), (5, 3, 2)),  # exact
        (7, (0.5, 0.3, 0.2), (4, 2, 1)),  # 3.5, 2.1, 1.4: the one that is left goes to the remainder 0.5
        (8, (0.45, 0.3, 0.25), (4, 2, 2)),  # 3.6, 2.4, 2: to 0.6
        (9, (0.1, 0.15, 0.75), (1, 1, 7)),  # 0.9, 1.35, 6.75: two left, to 0.9 and 0.75
        (8, (1 / 3, 1 / 3, 1 / 3), (3, 3, 2)),  # three times 2.67: ties by name
        (1, (0.5, 0.5), (1, 0)),
        (100, (0.29, 0.71), (29, 71)),  # 0.29 · 100 is 28.999999999999996
        (6, (), ()),
    ],
)
def test_tiers_are_dealt_by_share(count: int, shares: tuple[float, ...], sizes: tuple[int, ...]) -> None:
    tiers = Counter(client.tier for client in deal(count, share(*shares)))
    expected = dict(zip("abc", sizes, strict=False)) if shares else {"default": count}
    assert tiers == Counter(expected)


def test_clients_come_in_the_order_of_their_ids_with_what_their_tier_has() -> None:
    clients = deal(6, {"weak": {"share": 0.5, "mask_ratio": 0.25}, "strong": {"share": 0.5}})
    assert [client.id for client in clients] == [f"c{number:02d}" for number in range(6)]
    assert [client.index for client in clients] == list(range(6))
    assert [client.num_examples for client in clients] == [1, 2, 3, 4, 5, 6]
    assert {(client.tier, client.capacity.get("mask_ratio", 1.0)) for client in clients} == {
        ("weak", 0.25),
        ("strong", 1.0),
    }
    assert [client.capacity for client in deal(3, {})] == [{}] * 3


def test_a_tier_may_list_its_clients() -> None:
    """Of eight clients two are listed; the six others are dealt by shares, 3 and 3."""
    tiers = {"phone": {"clients": ["c03", "c00"]}, "a": {"share": 0.5}, "b": {"share": 0.5}}
    clients = deal(8, tiers)
    assert [client.id for client in clients if client.tier == "phone"] == ["c00", "c03"]
    assert Counter(client.tier for client in clients) == {"phone": 2, "a": 3, "b": 3}
    only = {"phone": {"clients": ["c00", "c01"]}}
    assert {client.tier for client in deal(2, only)} == {"phone"}
    with pytest.raises(ConfigError, match="no tier lists c02; list them, or give one tier share: 1"):
        deal(3, only)
    with pytest.raises(ConfigError, match=r"tiers.phone.clients: no client 'c01'.*the clients are c00"):
        deal(1, only)


def test_the_seed_deals_the_tiers() -> None:
    def dealt(seed: int) -> list[str]:
        return [client.tier for client in deal(20, share(0.5, 0.5), seed)]

    assert dealt(1) == dealt(1)
    assert dealt(1) != dealt(2)
    assert dealt(1) != sorted(dealt(1))


# ---------------------------------------------------------------- whole experiments


@pytest.fixture
def configure(tmp_path: Path) -> Callable[..., Any]:
    """configure(**changes): a tiny experiment that fits together, until the changes (`__` for dots)."""
    base = {
        "rounds": 1,
        "method": "fedavg",
        "model": {
            "path": "random",
            "tokenizer": "bytes",
            "config": {
                "model_type": "bert",
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 16,
                "max_position_embeddings": 64,
            },
        },
        "data": {"source": "synthetic", "examples_per_client": 12, "max_length": 16, "cache_dir": str(tmp_path / "c")},
        "partition": {"kind": "by_file"},
        "clients": {"count": 3},
        "runtime": "inline",
    }

    def build(**changes: Any) -> Any:
        return load_config(base, {path.replace("__", "."): value for path, value in changes.items()})

    return build


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """files(labels, ...): one file of twelve examples per client with these labels by turns, as changes."""

    def write(*clients: str) -> dict[str, Any]:
        paths = {}
        for number, labels in enumerate(clients):
            rows = [{"text": f"text {n}", "label": labels[n % len(labels)]} for n in range(12)]
            path = tmp_path / f"client{number}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            paths[f"client{number}"] = str(path)
        return {"data__source": "files", "data__files": paths, "clients__count": None}

    return write


def test_what_fits_together(configure: Callable[..., Any]) -> None:
    config = configure(method=["local", {"name": "fedreft", "label": "mine"}])
    prepared = prepare(config)
    assert isinstance(prepared, Prepared)
    assert [client.id for client in prepared.clients] == sorted(prepared.data.shards)
    assert list(prepared.costs) == ["local", "mine"]
    assert prepared.architecture.num_labels == len(prepared.data.label_names) == 4
    job = prepared.worker_setups(config.method[1])["default"]
    assert (job.entry.key, job.label_names, job.pad_token_id) == ("mine", prepared.data.label_names, 256)


def test_costs_need_data_only_where_the_number_of_classes_is_not_given(configure: Callable[..., Any]) -> None:
    """LoRA r = 8 on q and v of two layers: 2·2·8·32 = 1024; 4 classes · 17 = 68, or 7 · 17 = 119 as given."""
    assert costs_from_configuration(configure())["fedavg"]["default"].trainable == 1024 + 68
    nowhere = {"data__source": "files", "data__files": {"train": "/nowhere.jsonl"}, "model__config__num_labels": 7}
    assert costs_from_configuration(configure(**nowhere))["fedavg"]["default"].trainable == 1024 + 119
    for task, trainable in (("regression", 1024 + 17), ("causal_lm", 1024)):
        nowhere = {"data__source": "files", "data__files": {"train": "/nowhere.jsonl"}, "task": task}
        causal = {"model__config__is_decoder": True} if task == "causal_lm" else {}
        assert costs_from_configuration(configure(**nowhere, **causal))["fedavg"]["default"].trainable == trainable
    with pytest.raises(ConfigError, match="data.files.train: no such file: /nowhere.jsonl"):
        costs_from_configuration(configure(data__source="files", data__files={"train": "/nowhere.jsonl"}))


def test_a_given_number_of_classes_must_be_the_datas(configure: Callable[..., Any]) -> None:
    assert prepare(configure(model__config__num_labels=4)).architecture.num_labels == 4
    with pytest.raises(ConfigError, match="^model.config.num_labels: 5, but the data has 4 classes$"):
        prepare(configure(model__config__num_labels=5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"method": "fedavgg"},
            "method 'fedavgg': unknown method 'fedavgg' (did you mean 'fedavg'?); allowed: ditto, ",
        ),
        (
            {"method": {"name": "fedalt", "mixr": "none"}},
            "method 'fedalt': unknown hyperparameter 'mixr' (did you mean",
        ),
        (
            {"lora__targets": ["qurey"]},
            "lora.targets: BertForSequenceClassification has no linear layer 'qurey' (did you mean 'query'?); it has ",
        ),
        (
            {"method": ["local", {"name": "fedhft", "lora": {"targets": ["classifier"]}}]},
            "lora.targets: BertForSequenceClassification has no linear layer 'classifier'",
        ),
        ({"method": "fedreft", "reft__layers": [0, 2]}, "reft.layers: no block 2; the model has blocks 0 to 1"),
        ({"method": "fedreft", "reft__rank": 17}, "reft.rank: 17 is above the model's hidden size 16"),
        ({"evaluation__metric": "pearson"}, "evaluation.metrics: "),
        (
            {"clients__tiers": {"weak": {"share": 1, "precision": "float16"}}, "device": "cpu"},
            "tier 'weak': float16 needs a GPU; on a CPU use bfloat16 or float32",
        ),
        (
            {
                "clients__tiers": {
                    "weak": {
                        "share": 1,
                        "engine": "deepspeed",
                        "offload": {"params": "cpu"},
                        "deepspeed": {"zero_optimization": {"stage": 1}},
                    }
                }
            },
            "clients.tiers.weak.deepspeed.zero_optimization.stage: 1 contradicts offload {params: cpu}, which needs st",
        ),
        (
            {
                "train__optimizer": "sgd",
                "clients__tiers": {"weak": {"share": 1, "engine": "deepspeed", "offload": {"optimizer": "cpu"}}},
            },
            "train.optimizer: sgd cannot be combined with offload {optimizer: cpu}",
        ),
        (
            {
                "method": {"name": "fedavg", "adapter": "full"},
                "clients__tiers": {"weak": {"share": 1, "precision": "int8"}},
            },
            "method 'fedavg' on tier 'weak': the whole model would train in int8, which cannot train; use float32, or",
        ),
        (
            {"method": "fedreft", "clients__tiers": {"weak": {"share": 1, "reft_layers": [7]}}},
            "clients.tiers.weak: reft.layers: no block 7; the model has blocks 0 to 1",
        ),
        ({"data__max_length": 65}, "data.max_length: 65, but the model reads at most 64 tokens"),
        ({"clients__count": None}, "clients.count: the source `synthetic` plants clients; say how many"),
        ({"partition__min_examples": 13}, "partition by_file: every client needs 20 examples, so that 13 remain for "),
        ({"model__config__hidden_sise": 8}, "model.config.hidden_sise: bert has no such field (did you mean 'hidden_"),
        ({"model__config__model_type": "brt"}, "model.config.model_type: transformers knows no 'brt' (did you mean "),
        ({"model__config__vocab_size": 100}, "model.tokenizer: has 259 tokens, but the model 'random' only 100; "),
        (
            {"task": "causal_lm", "method": "head_only"},
            "method head_only: needs a task head; task `causal_lm` has none",
        ),
        (
            {"task": "causal_lm", "method": {"name": "fedhft", "features": "head"}},
            "method fedhft with features: head: needs a task head",
        ),
    ],
)
def test_what_does_not_fit_says_where(configure: Callable[..., Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare(configure(**changes))
    assert str(caught.value).startswith(message)


def test_what_is_generated_needs_positions_too(configure: Callable[..., Any], files: Callable[..., Any]) -> None:
    """40 tokens of prompt and answer and 32 generated ones are 72; the model reads 64."""
    changes = files("ab", "ab", "ab") | {"task": "causal_lm", "data__prompt": "{text}", "data__answer": "{label}"}
    prepare(configure(**changes, data__max_length=32, evaluation__metric="exact_match"))
    with pytest.raises(ConfigError, match=r"^data.max_length: 40, plus evaluation.max_new_tokens: 32, but .* 64 t"):
        prepare(configure(**changes, data__max_length=40, evaluation__metric="exact_match"))


@pytest.mark.parametrize(("ratio", "said"), [(1.0, True), (0.5, False)])
def test_a_mask_without_a_mask_ratio_is_said(
    configure: Callable[..., Any], caplog: pytest.LogCaptureFixture, ratio: float, said: bool
) -> None:
    tiers = {"strong": {"share": 0.5}, "weak": {"share": 0.5, "mask_ratio": ratio}}
    prepare(configure(clients__tiers=tiers, method=[{"name": "fedavg", "mask": "energy"}]))
    assert ("mask: energy has no effect" in caplog.text) == said


def test_a_metric_names_a_class_of_the_data(configure: Callable[..., Any], files: Callable[..., Any]) -> None:
    """What the configuration says stays; workers get the index, for `compute` sees nothing else."""
    config = configure(**files("ab", "ba"), evaluation__metric={"name": "f1", "positive": "a"})
    prepared = prepare(config)
    assert prepared.config == config
    setup = prepared.worker_setups(config.method[0])["default"]
    assert setup.config.evaluation.metrics == (F1(positive=0),)
    with pytest.raises(ConfigError, match="^metric f1: positive: the data has no class 'c'.*; allowed: a, b$"):
        prepare(configure(**files("ab", "ba"), evaluation__metric={"name": "f1", "positive": "c"}))


def test_a_metric_needs_an_answer_in_every_reference(configure: Callable[..., Any], files: Callable[..., Any]) -> None:
    changes = files("ab", "12") | {"task": "causal_lm", "data__prompt": "{text}", "data__answer": "{label}"}
    changes |= {"data__max_length": 32, "evaluation__max_new_tokens": 8}
    prepare(configure(**changes, evaluation__metric={"name": "extracted_match", "rule": "after_phrase"}))
    message = (
        "^metric extracted_match: the rule last_number finds no answer in the reference '[ab]'; choose another rule"
    )
    with pytest.raises(DataError, match=message):
        prepare(configure(**changes, evaluation__metric={"name": "extracted_match", "rule": "last_number"}))


def test_end_tokens_are_tokens_of_the_vocabulary(configure: Callable[..., Any], files: Callable[..., Any]) -> None:
    """Of the byte tokenizer: 258 ends every text, 10 is a line break, written Ċ; two of them are no token."""
    changes = files("ab", "ab", "ab") | {"task": "causal_lm", "data__prompt": "{text}", "data__answer": "{label}"}
    changes |= {"data__max_length": 32, "evaluation__metric": "exact_match"}
    prepared = prepare(configure(**changes, evaluation__generation={"end_tokens": ["Ċ", "<eos>"]}))
    (setup,) = prepared.worker_setups(prepared.config.method[0]).values()
    assert setup.end_token_ids == (258, 10)
    with pytest.raises(ConfigError, match=r"^evaluation.generation.end_tokens: 'ĊĊ' is not a token .*stop_strings$"):
        prepare(configure(**changes, evaluation__generation={"end_tokens": ["ĊĊ"]}))


def test_more_clients_per_round_than_the_data_has(configure: Callable[..., Any], files: Callable[..., Any]) -> None:
    """Only the data knows how many there are."""
    assert len(prepare(configure(**files("ab", "ba"), clients__per_round=2)).clients) == 2
    message = "^clients.per_round: 3 clients per round, but the data has only 2 clients$"
    with pytest.raises(ConfigError, match=message):
        prepare(configure(**files("ab", "ba"), clients__per_round=3))


def test_one_class_is_nothing_to_tell_apart(configure: Callable[..., Any], files: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="column 'label' holds the single class 'a'; expected at least two$"):
        prepare(configure(**files("a", "a")))


@pytest.mark.parametrize(("over", "steps"), [("round", 5), ("run", 10)])
def test_a_warm_up_is_shorter_than_the_training(configure: Callable[..., Any], over: str, steps: int) -> None:
    """Five passes over at most eight examples are five steps a round, and ten in two rounds."""
    fields = {"rounds": 2, "train__epochs": 5, "train__schedule": "linear", "train__schedule_over": over}
    prepare(configure(**fields, train__warmup_steps=steps - 1))
    message = (
        f"^train.warmup_steps: {steps}, but with method 'fedavg' no client of tier 'default' takes more than {steps}"
    )
    with pytest.raises(ConfigError, match=message):
        prepare(configure(**fields, train__warmup_steps=steps))


def test_clients_whose_warm_up_does_not_end_are_counted(
    configure: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Half of the steps, rounded up, are all of a single one: that of the client with at most 8 examples."""
    paths = {}
    for name, number in (("large", 40), ("small", 10)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": f"text {n}", "label": "ab"[n % 2]}) + "\n" for n in range(number)))
        paths[name] = str(path)
    changes = {"data__source": "files", "data__files": paths, "clients__count": None}
    prepare(configure(**changes, train__warmup_steps=0.5))
    assert "train.warmup_steps: 0.5 are all steps that 1 of 2 clients take in a round with fedavg" in caplog.text
    caplog.clear()
    prepare(configure(**changes, train__epochs=2, train__warmup_steps=0.5))
    assert "warmup_steps" not in caplog.text


def test_a_missing_column(configure: Callable[..., Any], files: Callable[..., Any]) -> None:
    with pytest.raises(
        ConfigError, match=r"client0.jsonl: no column 'lable' \(data.label\) \(did you mean 'label'\?\)"
    ):
        prepare(configure(**files("ab", "ba"), data__label="lable"))


def test_the_costs_are_those_of_each_tier(configure: Callable[..., Any]) -> None:
    """Whoever the seed deals to it. q and v, r = 2: `pre` trains 4 · (32 + 2·⌈16ρ⌉) + 68. With r_k = 1 it is half as
    much: 4 · (16 + ⌈16ρ⌉) + 68."""
    tiers = {"weak": {"share": 0.7, "mask_ratio": 0.25}, "strong": {"share": 0.3, "mask_ratio": 0.5}}
    tiers["tiny"] = {"clients": ["client_000"], "lora_rank": 1, "mask_ratio": 0.25}
    method = {"name": "fedhft", "timing": "pre"}
    for seed in range(3):
        costs = prepare(configure(method=method, lora__rank=2, clients__tiers=tiers, seed=seed)).costs["fedhft"]
        found = {tier: cost.trainable for tier, cost in costs.items()}
        assert found.items() <= {"weak": 4 * 40 + 68, "strong": 4 * 48 + 68, "tiny": 4 * 20 + 68}.items()
        assert {"weak", "tiny"} <= set(found)


def test_a_single_client_has_no_others(configure: Callable[..., Any]) -> None:
    """FedALT's downlink is then only the head, 4 · 17 numbers."""
    prepared = prepare(configure(method="fedalt", clients__count=1))
    assert prepared.costs["fedalt"]["default"].downlink == 68
