"""What there is to know about every built-in method, taken from its code.

Texts are the docstrings of the method's module and class. What it trains, sends and keeps is seen in two rounds of five
clients on a tiny model of shapes, whose parts have different sizes, so that a size says which part it is.
"""

import dataclasses
import importlib
import inspect
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from fedray.adapters.adapter import Adapter
from fedray.adapters.portable import Form, form_of
from fedray.config import Config
from fedray.config.option import Option
from fedray.errors import ConfigError
from fedray.methods.registry import COMMON_LORA, METHODS, SECTIONS
from fedray.models.architecture import architecture
from fedray.planning.accounting import Attached, Exchange, exchange
from fedray.planning.costs import attached
from fedray.storage.state_tree import leaves
from fedray.types import Client

REQUIRED: Mapping[str, Any] = {"carried_rank": 64}
"""Values of hyperparameters that have no default, where a method is only looked at."""

WORDS = {"lora": "LoRA", "lora.A": "A", "lora.B": "B", "reft": "LoReFT", "rest": "second LoRA"}
"""What tables call an adapter's groups and their parts; others have their own names."""

COHORT = 5
"""Clients in a round."""

MODEL = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "vocab_size": 64,
}
"""Query 64 x 64 and value 32 x 64. At rank 3, A has 384 numbers, B 288, the mixers 256, LoReFT 774, and the head of 5
classes 320. Five clients' 15 columns are below every width."""


@dataclass(frozen=True)
class Hyperparameter:
    """A field of a method.

    Attributes:
        kind: its type, or the values that it may have.
        default: as in a configuration; None where a value is required.
        section: whether it is a section of the configuration.
    """

    name: str
    kind: str
    default: str | None
    documentation: str
    section: bool


@dataclass(frozen=True)
class MethodFacts:
    """A built-in method.

    Attributes:
        summary: the class in one sentence.
        about: the module's docstring.
        arxiv: id of its paper; None if there is none.
        trains: parts that a client trains.
        down, up: parts that a client receives and sends in its second round, with their number if it is not 1.
        kept: parts that a client keeps from round to round.
        personalised: whether clients end up with models of their own.
        ranks: whether tiers may have LoRAs of unequal rank; None if it has no LoRA.
        export: what its adapter comes down to outside of fedray.
        hyperparameters: in the order of the fields.
    """

    name: str
    summary: str
    about: str
    arxiv: str | None
    trains: str
    down: str
    up: str
    kept: str
    personalised: bool
    ranks: bool | None
    export: Form
    hyperparameters: tuple[Hyperparameter, ...]


def catalogue() -> tuple[MethodFacts, ...]:
    """Return all built-in methods, sorted by name."""
    return tuple(method_facts(name) for name in METHODS.names)


def method_facts(name: str) -> MethodFacts:
    """Return what there is to know about a built-in method.

    Raises:
        ConfigError: there is no such method.
    """
    try:
        cls = METHODS.find(name)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    about = inspect.cleandoc(importlib.import_module(f"{METHODS.package}.{name}").__doc__ or "")
    paper = re.search(r"\b\d{4}\.\d{5}\b", about)
    config = _config(name)
    whole, seen = _seen(config, None)
    units = _units(whole.adapter)
    kept = _parts(seen.state, units)
    return MethodFacts(
        name,
        _sentence(cls),
        about,
        paper[0] if paper else None,
        ", ".join(_trained(whole.adapter)),
        _parts(seen.downlink, units),
        _parts(seen.uplink, units),
        kept,
        getattr(whole.method, "personalised", bool(kept)),
        _unequal_ranks(config, seen),
        form_of(whole.adapter),
        tuple(_hyperparameters(cls)),
    )


def minimal_entry(name: str) -> dict[str, Any]:
    """Return the shortest entry of a configuration that names a method: itself, and values for what has no default."""
    fields = {field.name for field in dataclasses.fields(METHODS.find(name))}
    return {"name": name, **{field: value for field, value in REQUIRED.items() if field in fields}}


def _config(name: str) -> Config:
    return Config.model_validate(
        {
            "rounds": 2,
            "method": [minimal_entry(name)],
            "model": {"path": "random", "tokenizer": "bytes", "config": MODEL},
            "data": {"source": "synthetic"},
            "clients": {"tiers": {"whole": {"share": 0.5}, "less": {"share": 0.5, "lora_rank": 1}}},
            "lora": {"rank": 3},
            "reft": {"rank": 3},
        }
    )


def _seen(config: Config, tier: str | None) -> tuple[Attached, Exchange]:
    """Return the method with its adapter, and what a client has in its second round.

    Args:
        tier: the client's; None: it holds the whole adapter.
    """
    (entry,) = config.method
    arch = architecture(config.model, config.task, 5, None, None)
    whole = attached(config, arch, entry, None)
    held = whole if tier is None else attached(config, arch, entry, tier)
    capacity = {} if tier is None else config.clients.tier(tier).capacity
    clients = [Client(f"client_{i:03d}", i, 1, tier or "whole", capacity) for i in range(COHORT)]
    return whole, exchange(whole, held, clients)


def _unequal_ranks(config: Config, whole: Exchange) -> bool | None:
    """Return whether a tier with a smaller rank trains less; None if its rank makes no difference."""
    try:
        _, less = _seen(config, "less")
    except ConfigError:
        return False
    return True if less.trainable < whole.trainable else None


def _units(adapter: Adapter) -> dict[int, str]:
    """Return the names of the adapter's groups, each before its parts, by size. Where sizes are equal, a group has
    precedence over a part, and then the first one."""
    groups = {adapter.layout(name).size: name for name in reversed(adapter.names)}
    found: dict[int, str] = {}
    for group in adapter.names:
        for name in (group, *(f"{group}.{part}" for part in _part_names(adapter, group))):
            size = adapter.layout(name).size
            if groups.get(size, name) == name:
                found.setdefault(size, WORDS.get(name, name))
    return found


def _part_names(adapter: Adapter, group: str) -> list[str]:
    return list(dict.fromkeys(slot.part for slot in adapter.layout(group).slots))


def _trained(adapter: Adapter) -> Iterator[str]:
    """Yield the groups that train, or those parts of them that do."""
    for group in adapter.groups:
        trained = {e.slot.part for e in group.entries if e.parameter.requires_grad}
        parts = _part_names(adapter, group.name)
        names = [group.name] if trained == set(parts) else [f"{group.name}.{part}" for part in parts if part in trained]
        yield from (WORDS.get(name, name) for name in names)


def _parts(payload: Any, units: Mapping[int, str]) -> str:
    """Return what a payload's arrays are: parts of the adapter, or multiples of one, or else the fields' own names."""
    sizes = {path: value.size for path, value in leaves(payload) if isinstance(value, np.ndarray) and value.size}
    fields: dict[str, dict[str, int]] = {}
    for path, size in sizes.items():
        fields.setdefault(path.partition("/")[0], {})[path] = size
    counts: Counter[str] = Counter()
    for inner in fields.values():
        if whole := _multiple(sum(inner.values()), units):
            counts.update(whole)
            continue
        for path, size in inner.items():
            name = [name for name in path.split("/") if not name.isdigit()][-1]
            counts.update(_multiple(size, units) or {name: 1})
    known = [name for name in units.values() if name in counts]
    names = [*known, *(name for name in counts if name not in known)]
    return ", ".join(name if counts[name] == 1 else f"{counts[name]} × {name}" for name in names)


def _multiple(size: int, units: Mapping[int, str]) -> dict[str, int] | None:
    """Return the part, or the largest one that is contained a whole number of times, with that number."""
    for unit in (size, *sorted(units, reverse=True)):
        if unit in units and size % unit == 0:
            return {units[unit]: size // unit}
    return None


def _sentence(cls: type[Any]) -> str:
    """Return the first sentence of a class's docstring."""
    first = inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].replace("\n", " ")
    return re.split(r"(?<=\.) ", first)[0].rstrip(".")


def _hyperparameters(cls: type[Any]) -> Iterator[Hyperparameter]:
    hints, documented = get_type_hints(cls), _documented(cls)
    for field in dataclasses.fields(cls):
        if not field.init or field.name == COMMON_LORA:
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        section = field.name in SECTIONS
        about = documented.get(field.name, "")
        if section and not about:
            described = Config.model_fields[field.name].description
            about = " ".join(described.split()) if described else f"the configuration's section `{field.name}`."
        missing = default is dataclasses.MISSING
        shown = "" if missing and section else None if missing else _as_configured(default)
        yield Hyperparameter(field.name, _kind(hints[field.name]), shown, about, section)


def _documented(cls: type[Any]) -> dict[str, str]:
    """Return what the docstrings of a class and of those that it is derived from say of its attributes."""
    found: dict[str, str] = {}
    for base in cls.__mro__:
        text = inspect.cleandoc(vars(base).get("__doc__") or "").partition("Attributes:\n")[2]
        for entry in re.split(r"\n(?=    \w+(?:, \w+)*:)", "\n" + text)[1:]:
            names, _, about = entry.strip().partition(":")
            for name in names.split(", "):
                found.setdefault(name, " ".join(about.split()))
    return found


def _kind(hint: Any) -> str:
    """Return a field's type as a reader of a configuration sees it."""
    if get_origin(hint) is Literal:
        return " | ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, UnionType):
        parts = [part for part in get_args(hint) if part is not str]  # the name of one of the others
        return " | ".join(map(_kind, parts))
    if hint is type(None):
        return "null"
    if isinstance(hint, type) and issubclass(hint, Option):
        return " | ".join([*hint.registry().names, "class"])
    return "list" if get_origin(hint) is tuple else getattr(hint, "__name__", str(hint))


def _as_configured(value: Any) -> str:
    if isinstance(value, Option):
        return value.label
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return ", ".join(map(_as_configured, value)) if isinstance(value, tuple) else str(value)
