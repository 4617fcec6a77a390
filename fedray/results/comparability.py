"""Which runs can be compared: those of one data set, cohort, budget, base model and metric, seed by seed."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from fedray.config import Config, MethodConfig, Metric, to_mapping, values_by_path
from fedray.errors import ComparisonError, choices, nearest
from fedray.evaluation.metrics import configured_metrics
from fedray.results.run_result import RunResult

BUDGET = ("epochs", "max_steps", "batch_size", "accumulation")
"""Fields of `train` that say how much a client trains in a round. Others, such as the learning rate, are tuned for each
method."""
COHORT = ("per_round", "over_selection", "deadline_s")
"""Fields of `clients` that decide which clients take part."""
TIER = (
    *("share", "clients", "speed", "up_mbps", "down_mbps", "latency_s", "dropout"),
    *("lora_rank", "mask_ratio", "reft_layers", "precision", "workers", "batch_size", "accumulation"),
)
"""Fields of a tier that decide which clients take part, what they can hold, and how much they train."""
NOT_DATA = ("data.cache_dir",)
"""Fields of the sections `data` and `partition` that do not change the data."""
REASONS = {
    "rounds": "budgets",
    "train": "budgets",
    "clients": "cohorts",
    "model": "base models",
    "evaluation": "metrics",
    "task": "tasks",
}
"""What differs, by the first part of a setting's path."""
NAMED = 2
"""Settings in the name of a data set at most."""
SHOWN = 6
"""Differences that a message lists at most."""


@dataclass(frozen=True)
class MethodRun:
    """One method of one run.

    Attributes:
        data_sha256: fingerprint of the run's data, as in its summary.
        state_sha256: fingerprint of the method's final states.
    """

    run: RunResult
    entry: MethodConfig
    data_sha256: str
    state_sha256: str

    @property
    def method(self) -> str:
        """The method's name."""
        return self.entry.key

    @property
    def config(self) -> Config:
        """The run's configuration."""
        return self.run.config

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.config.seed

    def __str__(self) -> str:
        return f"{self.method} with seed {self.seed} in {self.run.place}"


@dataclass(frozen=True)
class ComparableRuns:
    """Runs of one data set that can be compared.

    Attributes:
        by_method: each method's run by seed; all methods have the same seeds.
    """

    name: str
    by_method: Mapping[str, Mapping[int, MethodRun]] = field(default_factory=dict)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of every method, sorted."""
        return tuple(next(iter(self.by_method.values())))

    @property
    def config(self) -> Config:
        """The configuration of one of the runs."""
        return next(iter(next(iter(self.by_method.values())).values())).config


def method_runs(run: RunResult) -> list[MethodRun]:
    """Return the finished methods of a run."""
    entries = {entry.key: entry for entry in run.config.method}
    return [
        MethodRun(run, entries[summary.method], summary.data_sha256, summary.state_sha256) for summary in run.summaries
    ]


def data_settings(config: Config) -> dict[str, Any]:
    """Return by dotted path what defines the data set of an experiment, apart from its seed."""
    raw = to_mapping(config)
    chosen = {"task": raw["task"], "data": raw["data"], "partition": raw["partition"]}
    values = values_by_path(chosen | {"clients": {"count": raw["clients"]["count"]}})
    return {path: value for path, value in values.items() if path not in NOT_DATA}


def data_key(config: Config) -> str:
    """Return a text that is equal for experiments on the same data set, whatever their seeds."""
    return json.dumps(data_settings(config), sort_keys=True)


def comparable_runs(found: Sequence[MethodRun], metric: str | None = None) -> list[ComparableRuns]:
    """Return the runs by data set, each with its methods and seeds.

    Args:
        metric: label of a metric that all have; default each run's first one.

    Raises:
        ComparisonError: they cannot be compared; the message says why.
    """
    groups = _by_data_set(found)
    _check_methods(groups)
    checked = []
    for name, members in zip(_names(groups), groups, strict=True):
        _check_data(members)
        _check_settings(members, metric)
        by_method: dict[str, dict[int, MethodRun]] = {}
        for one in members:
            by_seed = by_method.setdefault(one.method, {})
            _check_twice(by_seed.setdefault(one.seed, one), one)
        _check_methods_over_seeds(by_method)
        _check_seeds(by_method)
        in_order = {method: dict(sorted(by_seed.items())) for method, by_seed in by_method.items()}
        checked.append(ComparableRuns(name, in_order))
    return checked


def _by_data_set(found: Sequence[MethodRun]) -> list[list[MethodRun]]:
    """Return the runs in groups: of one data set are those whose configurations say so, and those whose data are
    identical."""
    groups: list[tuple[set[Any], list[MethodRun]]] = []
    for one in found:
        marks: set[Any] = {data_key(one.config), (one.seed, one.data_sha256)}
        same = [group for group in groups if marks & group[0]]
        merged = set().union(marks, *(others for others, _ in same)), [*chain(*(runs for _, runs in same)), one]
        groups = [merged if same and group is same[0] else group for group in groups if group not in same[1:]]
        groups += [] if same else [merged]
    return [members for _, members in groups]


def _check_methods(groups: Sequence[Sequence[MethodRun]]) -> None:
    """Check that every data set has several methods."""
    alone = next((group for group in groups if len({one.method for one in group}) < 2), None)
    if alone is None:
        return
    one = alone[0]
    if len(groups) == 1:
        raise ComparisonError(
            f"{one.run.place}: only {one.method} has finished; a comparison needs several methods, in one run or in "
            "several"
        )
    other = next(group for group in groups if group is not alone)[0]
    differing = _listed(_differences(data_settings(one.config), data_settings(other.config)))
    raise ComparisonError(
        f"not comparable: different data: {one.run.place} has only {one.method}, and {other.run.place} has other data"
        f"{differing or f' (data_sha256 {one.data_sha256[:12]} and {other.data_sha256[:12]})'}"
    )


def _check_data(members: Sequence[MethodRun]) -> None:
    """Check that runs with the same seed have identical examples."""
    first: dict[int, MethodRun] = {}
    for one in members:
        other = first.setdefault(one.seed, one)
        if one.data_sha256 != other.data_sha256:
            raise ComparisonError(
                f"not comparable: different data with seed {one.seed}: data_sha256 is {other.data_sha256[:12]} in "
                f"{other.run.place}, and {one.data_sha256[:12]} in {one.run.place}"
            )


def _check_settings(members: Sequence[MethodRun], metric: str | None) -> None:
    """Check that all methods and seeds have the same budget, cohorts, base model and metric."""
    first, *others = members
    expected = _settings(first, metric)
    for one in others:
        settings = _settings(one, metric)
        if lines := _differences(expected, settings):
            reasons = {REASONS[line.split(":")[0].split(".")[0]]: None for line in lines[:SHOWN]}
            raise ComparisonError(
                f"not comparable: different {' and '.join(reasons)}: {first} and {one} have" + _listed(lines)
            )


def _check_methods_over_seeds(by_method: Mapping[str, Mapping[int, MethodRun]]) -> None:
    """Check that a method is the same with every seed."""
    for by_seed in by_method.values():
        first, *others = by_seed.values()
        for one in others:
            if lines := _differences(_own_settings(first), _own_settings(one)):
                raise ComparisonError(f"not comparable: {first} is another method than {one}:" + _listed(lines))


def _check_twice(first: MethodRun, one: MethodRun) -> None:
    """Check that a method that two runs have with one seed is the same in both: repeated runs have the same bits."""
    if first.state_sha256 == one.state_sha256:
        return
    lines = _listed(_differences(_own_settings(first), _own_settings(one)))
    raise ComparisonError(
        f"{one.method} with seed {one.seed} is in {first.run.place} and in {one.run.place}, with different results; "
        f"name only one of them, or give the method another `label` in one{lines}"
    )


def _check_seeds(by_method: Mapping[str, Mapping[int, MethodRun]]) -> None:
    """Check that every method was run with the same seeds."""
    seeds = sorted({seed for by_seed in by_method.values() for seed in by_seed})
    missing = {method: [seed for seed in seeds if seed not in by_seed] for method, by_seed in by_method.items()}
    lines = [f"\n  {method} lacks seed {choices(lacking)}" for method, lacking in missing.items() if lacking]
    if lines:
        raise ComparisonError(
            "not comparable: differences are paired by seed, so all methods need the same seeds "
            f"({choices(seeds)}):{''.join(lines)}"
        )


def _settings(one: MethodRun, metric: str | None) -> dict[str, Any]:
    """Return by dotted path what has to be the same for all methods and seeds.

    Args:
        metric: label of a metric; default the first one.
    """
    config = one.config
    raw = to_mapping(config)
    clients, train = raw["clients"], to_mapping(config.section_for(one.entry).train)
    cohort = {name: clients[name] for name in COHORT}
    if config.clients.needs_example_seconds:
        cohort["example_seconds"] = clients["example_seconds"]
    tiers = {name: {key: tier[key] for key in TIER} for name, tier in clients["tiers"].items()}
    compared = named_metric(config, metric)
    measured: dict[str, Any] = {"metric": compared.label}
    if compared.reads == "texts":
        measured |= {name: raw["evaluation"][name] for name in ("max_new_tokens", "generation")}
    chosen = {
        "rounds": config.rounds,
        "train": {name: train[name] for name in BUDGET},
        "clients": cohort | {"tiers": tiers},
        "evaluation": measured,
        "model": raw["model"],
        "task": config.task,
    }
    return values_by_path(chosen)


def named_metric(config: Config, label: str | None) -> Metric:
    """Return a metric of an experiment by its label, or the first one.

    Raises:
        ComparisonError: it has no such metric.
    """
    metrics = {metric.label: metric for metric in configured_metrics(config)}
    if label is not None and label not in metrics:
        raise ComparisonError(f"metric: no {label!r}{nearest(label, metrics)}; {config.name} has {choices(metrics)}")
    return metrics[label] if label is not None else next(iter(metrics.values()))


def _own_settings(one: MethodRun) -> dict[str, Any]:
    """Return by dotted path what a method is in a run, which has to be the same for all its seeds."""
    return values_by_path(
        {
            "method": one.entry.name or one.entry.class_,
            "hyperparameters": one.entry.hyperparameters,
            **to_mapping(one.config.section_for(one.entry)),
        }
    )


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Return a line for each value that differs, at most `SHOWN`."""
    differing = [path for path in dict.fromkeys((*first, *second)) if first.get(path) != second.get(path)]
    lines = [f"{path}: {first.get(path)!r} and {second.get(path)!r}" for path in differing[:SHOWN]]
    return [*lines, f"and {len(differing) - SHOWN} more"] if len(differing) > SHOWN else lines


def _listed(lines: Iterable[str]) -> str:
    return "".join(f"\n  {line}" for line in lines)


def _names(groups: Iterable[Sequence[MethodRun]]) -> list[str]:
    """Return a name of its own for each data set: its experiment's name, and where names are equal, what differs."""
    configs = [group[0].config for group in groups]
    settings = [data_settings(config) for config in configs]
    paths = dict.fromkeys(path for values in settings for path in values)
    varying = [path for path in paths if len({json.dumps(values.get(path)) for values in settings}) > 1]
    names: list[str] = []
    for config, values in zip(configs, settings, strict=True):
        name = config.name
        if [other.name for other in configs].count(name) > 1:
            name += f" ({', '.join(f'{path}={values.get(path)}' for path in varying[:NAMED])})"
        names.append(f"{name}, data set {len(names) + 1}" if name in names else name)
    return names
