"""From an entry of `method:` to a method, and everything that can be wrong with one."""

import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from every_method import entry as minimal
from round_result import all_results
from tiny import tiny_bert

from fedray.config import Config, load_config
from fedray.errors import ConfigError, choices
from fedray.experiment.prepare import prepare
from fedray.experiment.run import run_experiment
from fedray.federation.events import MethodFinished
from fedray.federation.local_pool import LocalPool
from fedray.methods import protocol
from fedray.methods.fedalt import FedAlt
from fedray.methods.fedavg import FedAvg
from fedray.methods.protocol import AnyMethod, averages
from fedray.methods.registry import METHODS, build_method


def configure(method: Mapping[str, Any] | str, **changes: Any) -> Config:
    base = {
        "rounds": 3,
        "method": method,
        "model": tiny_bert(max_position_embeddings=64),
        "data": {"source": "synthetic", "examples_per_client": 12, "max_length": 16},
        "partition": {"kind": "by_file"},
        "clients": {"count": 3},
        "evaluation": {"every": 0},
        "device": "cpu",
        "runtime": "inline",
    }
    return load_config(base, changes)


def build(method: Mapping[str, Any] | str, **changes: Any) -> AnyMethod:
    config = configure(method, **changes)
    return build_method(config, config.method[0])


@pytest.mark.parametrize("name", METHODS.names)
def test_sections_fill_the_fields_that_a_method_declares(name: str) -> None:
    """An entry's own section goes before the common one, key by key; a section that is not read is refused."""
    fields = METHODS.find(name).__dataclass_fields__
    required = minimal(name)
    own = {section: {"rank": 3} for section in ("lora", "reft") if {section, "adapter"} & fields.keys()}
    if "adapter" not in fields:
        return check_sections(name, own, {**own, **required})
    sections = {"lora": "lora", "reft": "reft", "core": "lora"}
    fitting = [
        kind for kind in sections if "; use adapter: " not in refusal({**required, "name": name, "adapter": kind})
    ]
    assert fitting
    for kind in fitting:  # one adapter at a time
        section = {sections[kind]: own[sections[kind]]}
        check_sections(name, section, {"adapter": kind, **section, **required})


def check_sections(name: str, own: Mapping[str, Any], entry: Mapping[str, Any]) -> None:
    heads = ("local", "shared", "frozen_random")
    head = next(head for head in heads if not refusal({"name": name, **entry, "head": head}))
    built: Any = build({"name": name, "head": head, **entry}, **{"lora.alpha": 7, "reft.dropout": 0.2})
    assert type(built) is METHODS.find(name)
    holder = getattr(built, "adapter", built)
    if "lora" in own:
        assert (holder.lora.rank, holder.lora.alpha) == (3, 7)
    if "reft" in own:
        assert (holder.reft.rank, holder.reft.dropout) == (3, 0.2)
    assert built.head == head
    for other in {"lora", "reft"} - set(own):
        with pytest.raises(ConfigError, match=f"^method '{name}': has no use for the section '{other}'"):
            build({"name": name, **entry, other: {"rank": 3}})


def test_hyperparameters_are_set_and_read_as_their_types() -> None:
    built: Any = build({"name": "fedreft", "candidates": [0, 1], "tolerance": 1, "aggregate": "mean"})
    assert built.candidates == (0.0, 1.0)
    assert (type(built.tolerance), built.aggregate) == (float, "mean")
    auto: Any = build({"name": "fedhft", "clusters": "auto"})
    assert auto.clusters == "auto"


def refusal(method: Mapping[str, Any]) -> str:
    """What is wrong with an entry; empty: nothing."""
    try:
        build(method)
    except ConfigError as error:
        return str(error)
    return ""


def refused(method: Mapping[str, Any] | str) -> str:
    with pytest.raises(ConfigError) as caught:
        build(method)
    return str(caught.value)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            "fedhtf",
            f"method 'fedhtf': unknown method 'fedhtf' (did you mean 'fedhft'?); allowed: {choices(METHODS.names)}",
        ),
        ("zzz", f"method 'zzz': unknown method 'zzz'; allowed: {choices(METHODS.names)}"),
        (
            {"name": "fedreft", "aggregate": "maen"},
            "method 'fedreft': aggregate: unknown aggregation rule 'maen' (did you mean 'mean'?); "
            "allowed: geometric_median, mean",
        ),
        (
            {"name": "fedalt", "rest": 3},
            "method 'fedalt': rest: expected the name of an aggregation rule, or a mapping with its `class`, got 3",
        ),
        (
            {"name": "fedavg", "weight": "uniform"},
            "method 'fedavg': unknown hyperparameter 'weight' (did you mean 'weights'?); allowed: adapter, weights",
        ),
        (
            {"name": "fedavg", "weights": "unifrom"},
            "method 'fedavg': weights: got 'unifrom': Input should be 'examples' or 'uniform' "
            "(did you mean 'uniform'?)",
        ),
        ({"name": "fedhft", "label": "mine", "n_init": "many"}, "method 'mine': n_init: got 'many': "),
        ({"name": "fedhft", "n_init": True}, "method 'fedhft': n_init: expected a number, got true"),
        ({"name": "fedhft", "clusters": True}, "method 'fedhft': clusters: expected a number, got true"),
        ({"name": "fedhft", "n_init": 2.5}, "method 'fedhft': n_init: got 2.5: "),
        ({"name": "fedprox", "mu": math.inf}, "method 'fedprox': mu: expected a finite number, got inf"),
        (
            {"name": "fedrep", "head_epochs": math.inf},
            "method 'fedrep': head_epochs: expected a finite number, got inf",
        ),
        ({"name": "fedhft", "clusters": 0}, "fedhft.clusters: expected `auto` or at least 1, got 0"),
        ({"name": "fedalt", "trim": 0.5}, "fedalt.trim: expected a share in [0, 0.5), got 0.5"),
        # What would silently do nothing.
        (
            {"name": "fedreft", "lam": 0.25},
            "fedreft.lam: has no effect without mixing: fixed; set that, or leave lam out",
        ),
        (
            {"name": "fedreft", "mixing": "fixed", "candidates": [0.5]},
            "fedreft.candidates: has no effect without mixing: ad",
        ),
        ({"name": "fedalt", "alpha": 0.7}, "fedalt.alpha: has no effect without mixer: fixed"),
        ({"name": "fedalt", "trim": 0.1}, "fedalt.trim: has no effect without rest: trimmed_mean"),
        ({"name": "fedhft", "server_rank": 4}, "fedhft.server_rank: has no effect without server_state: rank_q"),
        ({"name": "fedhft", "max_clusters": 3}, "fedhft.max_clusters: has no effect without clusters: auto"),
        (
            {"name": "fedavg", "reft": {"rank": 1}},
            "method 'fedavg': has no use for the section 'reft' without `adapter: reft`",
        ),
        (
            {"name": "head_only", "head": "local"},
            "method 'head_only': head: local: this method's head is always 'shared'; leave it out",
        ),
    ],
)
def test_mistakes_are_named(method: Mapping[str, Any] | str, message: str) -> None:
    assert refused(method).startswith(message)


# ---------------------------------------------------------------- classes of the user's own


def documented() -> str:
    """The method that fedray.methods.protocol shows."""
    assert protocol.__doc__ is not None
    return textwrap.dedent(protocol.__doc__.partition("trains nothing:\n")[2])


def test_the_documented_method_runs_complete_rounds(own_folder: Path) -> None:
    """Three clients with 12 examples each: a quarter for testing leaves 9, and round(0.15 · 9) = 1 for validation
    leaves 8 to train on. Three rounds count 3 · 3 · 8 = 72, and the final pass adds none. Nothing is an array, so
    nothing counts as sent, and nothing is ever trained."""
    (own_folder / "counting_methods.py").write_text(documented())
    config = configure({"class": "counting_methods.Count"}, **{"data.cache_dir": str(own_folder / "cache")})
    prepared = prepare(config)
    assert [client.num_examples for client in prepared.clients] == [8, 8, 8]
    entry, pool = config.method[0], LocalPool(prepared.data.shards)
    initial = pool.setup(prepared.worker_setups(entry))
    federation = prepared.federation(entry, initial, pool)
    assert [len(done.results) for done in all_results(federation)] == [3, 3, 3, 3]
    assert federation.server.examples == 72
    *_, finished = run_experiment(prepared, pool, own_folder / "run")
    assert isinstance(finished, MethodFinished)
    summary = finished.summary
    assert (summary.method, summary.head) == ("Count", "-")
    assert (summary.trainable_parameters, summary.uplink_bytes, summary.downlink_bytes) == (0, 0, 0)


def test_a_class_has_hyperparameters_of_its_own(own_folder: Path) -> None:
    code = documented().replace("    lora: LoraSection\n", "    lora: LoraSection\n    step: int = 1\n")
    (own_folder / "stepping.py").write_text(code)
    built: Any = build({"class": "stepping.Count", "step": 5, "lora": {"rank": 3}})
    assert (built.step, built.lora.rank) == (5, 3)
    assert "unknown hyperparameter 'stap' (did you mean 'step'?); allowed: step" in refused(
        {"class": "stepping.Count", "stap": 5}
    )


@pytest.mark.parametrize(
    ("code", "name", "message"),
    [
        (None, "absent.Mine", "ModuleNotFoundError: No module named 'absent'"),
        (None, "Mine", "cannot be imported: ValueError: "),
        (None, ".absent.Mine", "cannot be imported: "),
        ("", "broken.Mine", "AttributeError: module 'broken' has no attribute 'Mine'"),
        ("def f(:", "broken.Mine", "SyntaxError: "),
        ("1 / 0", "broken.Mine", "ZeroDivisionError: division by zero"),
        ("Mine = 7", "broken.Mine", "broken.Mine must be a dataclass with the functions of .*; missing: attach, "),
        ("def Mine(): pass", "broken.Mine", "must be a dataclass with the functions of "),
    ],
)
def test_classes_that_are_not_there(own_folder: Path, code: str | None, name: str, message: str) -> None:
    if code is not None:
        (own_folder / "broken.py").write_text(code)
    with pytest.raises(ConfigError, match=f"^method 'Mine': .*{message}"):
        build({"class": name})


@pytest.mark.parametrize("function", ["attach", "init_server", "configure_train", "aggregate_train"])
def test_a_class_that_lacks_a_function(own_folder: Path, function: str) -> None:
    (own_folder / "lacking.py").write_text(documented().replace(f"def {function}(", f"def {function}_("))
    assert refused({"class": "lacking.Count"}).endswith(f"missing: {function}")


def test_a_class_that_is_no_dataclass(own_folder: Path) -> None:
    (own_folder / "plain.py").write_text(documented().replace("@dataclass(frozen=True)\nclass Count", "class Count"))
    assert refused({"class": "plain.Count"}).endswith("missing: @dataclass(frozen=True)")


def test_a_class_that_cannot_do_a_round_is_named_before_anything_starts(own_folder: Path) -> None:
    code = documented().replace("return Total(local.client.num_examples), client_state", "return 1 / 0")
    (own_folder / "failing.py").write_text(code)
    config = configure({"class": "failing.Count"}, **{"data.cache_dir": str(own_folder / "cache")})
    with pytest.raises(ConfigError, match="^method 'Count' on tier 'default': fails in a round on shapes: Zero"):
        prepare(config)


# ---------------------------------------------------------------- methods that only average


@dataclass(frozen=True)
class Median(FedAvg):
    """Needs every update, and inherits an attribute that says otherwise."""

    def aggregate_train(self, server: Any, updates: Any) -> Any:
        return server, {}


@dataclass(frozen=True)
class Uniform(Median):
    averages = "uniform"  # type: ignore[assignment]


@dataclass(frozen=True)
class Derived(Uniform):
    """Changes neither."""


@dataclass(frozen=True)
class Misspelt(FedAvg):
    averages = "unifrom"  # type: ignore[assignment]


def test_who_aggregates_in_its_own_way_gets_every_update_unless_it_says_otherwise() -> None:
    assert averages(FedAvg()) == "examples"
    assert averages(FedAvg(weights="uniform")) == "uniform"
    assert averages(Median()) is None
    assert averages(Uniform()) == averages(Derived()) == "uniform"
    assert averages(FedAlt()) is None
    with pytest.raises(ConfigError, match="Misspelt.averages: expected examples, uniform, got 'unifrom'"):
        averages(Misspelt())


def test_a_baseline_is_a_short_file() -> None:
    """At most 150 lines, as long as its paper's box; the three papers that fedray exists for may be longer."""
    folder = Path(protocol.__file__).parent
    lines = {name: len((folder / f"{name}.py").read_text("utf-8").splitlines()) for name in METHODS.names}
    longer = {name for name, number in lines.items() if number > 150}
    assert longer == {"fedreft", "fedalt", "fedhft"}
