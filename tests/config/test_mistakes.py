"""Every mistake in a configuration is named with its place and, where there is one, the nearest name."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_config import SMALLEST, message_of, with_section

from fedray.config import dump_yaml, load_config, load_sweep, parse_yaml
from fedray.errors import ConfigError


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("round", "rounds"),
        ("modle", "model"),
        ("model.pth", "path"),
        ("data.sources", "source"),
        ("partition.alhpa", "alpha"),
        ("clients.per_rounds", "per_round"),
        ("lora.rnk", "rank"),
        ("reft.position", "positions"),
        ("train.batchsize", "batch_size"),
        ("evaluation.evry", "every"),
        ("clients.tiers.phone.mask_ration", "mask_ratio"),
    ],
)
def test_an_unknown_key_gets_the_nearest_name(path: str, meant: str) -> None:
    lines = [line for line in message_of(with_section(path, 1)).splitlines() if "unknown key" in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"configuration: {path}: unknown key (did you mean {meant!r}?); allowed: ")


def test_an_unknown_key_lists_what_is_allowed_and_claims_no_likeness() -> None:
    expected = "configuration: lora.zzz: unknown key; allowed: alpha, dropout, rank, targets"
    assert message_of(with_section("lora.zzz", 1)) == expected


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        # wrong type
        ("rounds", "many", "rounds: got 'many': Input should be a valid integer"),
        ("rounds", 2.5, "rounds: got 2.5: Input should be a valid integer"),
        ("rounds", None, "rounds: got None: Input should be a valid integer"),
        ("lora", None, "lora: got None: Input should be a valid dictionary"),
        ("model.path", 3, "model.path: got 3: Input should be a valid string"),
        ("lora.targets", "q_proj", "lora.targets: got 'q_proj': Input should be a valid tuple"),
        ("method", 5, "method.0: got 5: Input should be a valid dictionary"),
        ("train.betas", [0.9], "train.betas"),
        # out of range
        ("rounds", 0, "rounds: got 0: Input should be greater than or equal to 1"),
        ("seed", -1, "seed: got -1: Input should be greater than or equal to 0"),
        ("lora.dropout", 1, "lora.dropout: got 1: Input should be less than 1"),
        ("lora.dropout", -0.1, "lora.dropout: got -0.1: Input should be greater than or equal to 0"),
        ("train.lr", 0, "train.lr: got 0: Input should be greater than 0"),
        ("train.lr", math.inf, "train.lr: got inf: Input should be a finite number"),
        ("train.lr", math.nan, "train.lr: got nan: Input should be"),
        ("train.betas", [0.9, 1], "train.betas.1: got 1: Input should be less than 1"),
        ("data.classes", 1, "data.classes: got 1: Input should be greater than or equal to 2"),
        ("clients.tiers", {"a": {"share": 1.5}}, "clients.tiers.a.share: got 1.5: Input should be less than or equal"),
        ("name", "../up", "name: got '../up': String should match pattern"),
        ("reft.positions", "first", "reft.positions: got 'first': String should match pattern"),
        # not among the choices
        ("task", "clasification", "did you mean 'classification'?"),
        ("data.source", "docstring", "did you mean 'docstrings'?"),
        ("data.splits", {"trian": "x"}, "did you mean 'train'?"),
        ("partition.kind", "by_colum", "did you mean 'by_column'?"),
        # true is not one
        ("rounds", True, "rounds: expected a number, got true"),
        ("train.lr", True, "train.lr: expected a number, got true"),
        ("train.max_steps", True, "train.max_steps: expected a number, got true"),
        ("train.clip", False, "train.clip: expected a number, got false"),
        ("clients.per_round", True, "clients.per_round: expected a number, got true"),
        ("clients.tiers", {"a": {"share": True}}, "clients.tiers.a.share: expected a number, got true"),
        ("train.betas", [True, 0.9], "train.betas: expected a number, got [true, 0.9]"),
        ("reft.layers", [True], "reft.layers: expected a number, got [true]"),
        # what one field says about another
        ("clients", {"count": 3, "per_round": 4}, "per_round is 4, but there are only 3 clients (clients.count)"),
        (
            "clients.tiers",
            {"phone": {"share": 0.5}, "laptop": {"share": 0.4}},
            "the shares of the tiers phone, laptop add up to 0.9; they must add up to 1",
        ),
        *[
            ("clients.tiers", {"phone": {"share": 1, **tier}}, expected)
            for tier, expected in (
                ({"clients": ["ann"]}, "clients.tiers.phone: a tier needs either `share` or `clients`"),
                ({"share": None}, "clients.tiers.phone: a tier needs either `share` or `clients`"),
                ({"offload": {"params": "cpu"}}, "phone: offload: needs engine: deepspeed, got engine: torch"),
                ({"deepspeed": {"zero_optimization": {}}}, "phone: deepspeed: needs engine: deepspeed"),
                ({"engine": "deepspeed", "offload": {"params": "nvme"}}, "params: nvme needs `path`"),
                ({"engine": "deepspeed", "offload": {"path": "/fast"}}, "path: only params: nvme writes to a folder"),
                (
                    {"resources": {"CPU": 3}},
                    "phone: resources: CPU have fields of their own: num_cpus",
                ),
                ({"reft_layers": []}, "clients.tiers.phone.reft_layers: got []: "),
                ({"engine": "deepsped"}, "clients.tiers.phone.engine: got 'deepsped': "),
                ({"precision": "float8"}, "clients.tiers.phone.precision: got 'float8': "),
                ({"mask_ratio": 0}, "clients.tiers.phone.mask_ratio: got 0: "),
                ({"num_gpus": 1.5}, "clients.tiers.phone.num_gpus: above 1, GPUs come whole"),
                ({"memory": "much"}, "clients.tiers.phone.memory: got 'much': "),
                ({"dropout": 1}, "clients.tiers.phone.dropout: got 1: "),
                ({"lora_rank": 9}, "clients.tiers.phone.lora_rank: 9 is above lora.rank 8 of method"),
            )
        ],
        *[
            ("train", train, expected)
            for train, expected in (
                ({"warmup_steps": 1.5}, "train.warmup_steps: expected a whole number, or a share below 1, got 1.5"),
                ({"warmup_rounds": -1}, "train.warmup_rounds: got -1: Input should be greater than or equal to 0"),
                (
                    {"schedule": "cosin"},
                    "train.schedule: got 'cosin': Input should be 'constant', 'linear' or 'cosi",
                ),
                (
                    {"lr": 0.1, "min_lr": 0.2, "schedule": "linear"},
                    "train: min_lr: 0.2 is above lr: 0.1",
                ),
                ({"min_lr": 1e-6}, "train: min_lr: 1e-06, but the learning rate does not fall; choose a schedule, a"),
                (
                    {"max_steps": 5, "warmup_steps": 5},
                    "train: warmup_steps: 5 are all of a round's at most max_steps: 5 steps; fewer, or schedule_over",
                ),
                (
                    {"max_steps": 3, "warmup_steps": 0.7},
                    "train: warmup_steps: 0.7 are all of a round's at most max_steps: 3 steps",
                ),
                *[
                    (
                        {"schedule_over": "run", field: value},
                        f"train: {field}: {value}, but schedule_over: run is one schedule for all rounds; leave",
                    )
                    for field, value in (("round_schedule", "linear"), ("warmup_rounds", 1.0), ("round_decay", 0.9))
                ],
                ({"warmup_rounds": 99}, "train.warmup_rounds: 99 are all of rounds: "),
                (
                    {"schedule_over": "run", "max_steps": 1, "warmup_steps": 99},
                    "train.warmup_steps: 99 are all of the run's at most ",
                ),
            )
        ],
        ("clients", {"tiers": {n: {"clients": ["ann"]} for n in "ab"}}, "tiers: ann listed twice; a client belongs to"),
        ("clients", {"over_selection": 0.3}, "over_selection: needs per_round"),
        ("model", {"path": "random", "tokenizer": "bytes"}, "model.config: a random model needs `model_type`"),
        ("model", {"path": "random", "config": {"model_type": "bert"}}, "model.tokenizer: a random model has none"),
        ("data", {"source": "hub"}, "data.name: the source `hub` needs"),
        ("data", {"source": "files"}, "data.files: the source `files` needs"),
        ("partition.kind", "by_column", "partition.column: the partition `by_column` needs"),
        # methods
        ("method", [], "method: name at least one method"),
        ("method", {}, "method.0: a method needs either `name` (built in) or `class`"),
        ("method", {"name": "a", "class": "b.C"}, "method.0: a method needs either `name` (built in) or `class`"),
        ("method", ["fedalt", "fedalt"], "method: 'fedalt' occurs 2 times; give each entry a `label` of its own"),
        ("method", ["Mine", {"class": "x.Mine"}], "method: 'Mine' occurs 2 times"),
        ("method", {"name": "fedalt", "label": "a/b"}, "method: 'a/b' cannot name a folder"),
        ("method", {"name": "fedalt", "head": "privat"}, "method.0.head: got 'privat': "),
        ("method", {"name": "fedalt", "lora": 3}, "method.0.lora: got 3: Input should be a valid dictionary"),
    ],
)
def test_a_mistake_is_named_with_its_place(path: str, value: object, expected: str) -> None:
    message = message_of(with_section(path, value))
    assert expected in message
    assert message.startswith("configuration: ")


def test_numbers_where_booleans_belong_stay_booleans() -> None:
    assert load_config(with_section("reft.tie_positions", True)).reft.tie_positions is True


def test_shares_may_be_off_by_rounding_only() -> None:
    thirds = {name: {"share": 1 / 3} for name in "abc"}
    assert list(load_config(with_section("clients.tiers", thirds)).clients.tiers) == ["a", "b", "c"]
    assert "add up to 0.99;" in message_of(with_section("clients.tiers", {name: {"share": 0.33} for name in "abc"}))


def test_several_mistakes_at_once_have_a_line_each() -> None:
    lines = message_of({"rounds": 0, "method": "local", "data": {"source": "docstrings", "txt": "x"}}).splitlines()
    assert len(lines) == 3
    assert "configuration: model: missing" in lines
    assert "configuration: rounds: got 0: Input should be greater than or equal to 1" in lines
    assert any(line.startswith("configuration: data.txt: unknown key (did you mean 'text'?)") for line in lines)


@pytest.mark.parametrize("value", [{1, 2}, object(), b"bytes", 1 + 2j])
def test_python_values_that_yaml_could_not_hold(value: object) -> None:
    message = message_of(SMALLEST | {"method": {"name": "fedalt", "lam": value}})
    assert f"is of type {type(value).__name__}; allowed: text, numbers, lists, mappings, null" in message


def test_numpy_numbers_and_paths_are_taken(tmp_path: Path) -> None:
    config = load_config(
        SMALLEST
        | {"rounds": np.int64(3), "storage_path": tmp_path, "method": {"name": "fedalt", "lam": np.float32(0.5)}},
        {"train.lr": np.float64(0.25)},
    )
    assert (config.rounds, config.storage_path, config.train.lr) == (3, str(tmp_path), 0.25)
    assert config.method[0].hyperparameters == {"lam": 0.5}
    assert load_config(parse_yaml(dump_yaml(config), "text")) == config


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"reft": {"rnk": 3}}, "reft.rnk: unknown key (did you mean 'rank'?); allowed: dropout, kind, layers"),
        ({"lora": {"taregts": []}}, "lora.taregts: unknown key (did you mean 'targets'?); allowed: alpha, dropout"),
        ({"train": {"batchsize": 3}}, "train.batchsize: unknown key (did you mean 'batch_size'?); allowed: accum"),
        ({"reft": {"kind": "lorefft"}}, "reft.kind: got 'lorefft': "),
        ({"reft": {"kind": "lorefft"}}, "(did you mean 'loreft'?)"),
        ({"lora": {"rank": 0}}, "lora.rank: got 0: Input should be greater than or equal to 1"),
        ({"lora": {"rank": True}}, "lora.rank: expected a number, got true"),
        ({"train": {"lr": 0, "eps": -1}}, "train.lr: got 0: Input should be greater than 0; train.eps: got -1"),
    ],
)
def test_mistakes_in_a_method_section_name_the_method_and_the_section(section: dict[str, Any], expected: str) -> None:
    message = message_of(SMALLEST | {"method": ["local", {"name": "fedreft", "label": "mine", **section}]})
    assert message.startswith("configuration: method 'mine': ")
    assert expected in message


def test_a_tier_without_gpu_cannot_use_cuda() -> None:
    message = message_of(with_section("clients.tiers", {"phone": {"share": 1, "num_gpus": 0}}) | {"device": "cuda"})
    assert message.endswith("`cuda` needs clients.num_gpus above 0 (or left out), got 0 (tier 'phone')")


def test_a_sweep_is_no_experiment_and_an_experiment_no_sweep() -> None:
    sweep = {"base": SMALLEST, "space": {"seed": [0, 1]}}
    with pytest.raises(ConfigError, match="this is a sweep .* start it with `fedray sweep`"):
        load_config(sweep)
    with pytest.raises(ConfigError, match="this is one experiment, .* start it with `fedray run`"):
        load_sweep(SMALLEST)
    assert load_sweep(sweep).base == SMALLEST
