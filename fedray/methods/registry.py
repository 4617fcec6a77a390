"""Builds the method that a configuration's entry names: a module of this package, or a user's own class."""

import dataclasses
import math
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from fedray.adapters.kind import AdapterKind, parse_kind
from fedray.config import Config, MethodConfig, MethodSections, describe
from fedray.config.registry import Registry, import_class
from fedray.config.section import Mistakes
from fedray.errors import ConfigError, choices, nearest
from fedray.methods.protocol import AnyMethod, FederatedMethod

METHODS: Registry[Any] = Registry(
    "method",
    "fedray.methods",
    object,
    others=("bases", "parts", "protocol", "registry"),
)

SECTIONS = ("lora", "reft", "head")
"""Fields that are filled from the configuration's sections where a method declares them."""

COMMON_LORA = "common_lora"
"""Field that is filled with the section `lora` as tiers without a limit have it, where a method declares it."""


def build_method(config: Config, entry: MethodConfig, tier: str | None = None) -> AnyMethod:
    """Return the method of one entry of `config.method`, its hyperparameters checked.

    Args:
        tier: on whose devices it trains; None: the whole method, as the driver has it.

    Raises:
        ConfigError: unknown method or hyperparameter, wrong type or value, a class that cannot be imported or that
            lacks one of the protocol's functions.
    """
    where = f"method {entry.key!r}"
    cls = _find(entry, where)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    own = [name for name in fields if name not in (*SECTIONS, COMMON_LORA)]
    kinds = [name for name in fields if get_type_hints(cls)[name] is AdapterKind]
    for name in entry.hyperparameters:
        if name not in own:
            raise ConfigError(f"{where}: unknown hyperparameter {name!r}{nearest(name, own)}; allowed: {choices(own)}")
    for name in ("lora", "reft"):
        if getattr(entry, name) and name not in fields and not kinds:
            used = [section for section in SECTIONS if section in fields]
            raise ConfigError(f"{where}: has no use for the section {name!r}; it reads {choices(used)}")
    sections = config.section_for(entry, tier)
    filled = {name: getattr(sections, name) for name in SECTIONS if name in fields}
    if COMMON_LORA in fields:
        filled[COMMON_LORA] = config.section_for(entry).lora
    if "head" in filled and filled["head"] is None:
        default = fields["head"].default
        filled["head"] = "shared" if default is dataclasses.MISSING else default
    for name in kinds:
        filled[name] = _kind(entry.hyperparameters.get(name, fields[name].default), sections, f"{where}: {name}")
    try:
        method: AnyMethod = TypeAdapter(cls).validate_python({**entry.hyperparameters, **filled})
    except ValidationError as error:
        raise ConfigError("\n".join(f"{where}: {line}" for line in describe(error, Config))) from None
    for name, value in entry.hyperparameters.items():
        found = getattr(method, name)
        if isinstance(value, bool) and not isinstance(found, bool):  # pydantic reads `true` as 1
            raise ConfigError(f"{where}: {name}: expected a number, got {str(value).lower()}")
        if isinstance(found, float) and not math.isfinite(found):
            raise ConfigError(f"{where}: {name}: expected a finite number, got {found}")
    _check_effect(method, entry, where)
    return method


def _check_effect(method: AnyMethod, entry: MethodConfig, where: str) -> None:
    """Refuse what this entry itself asks for and the method would not do.

    Raises:
        ConfigError: a section of the adapter that it does not train, a head that it treats otherwise.
    """
    adapter = getattr(method, "adapter", None)
    for name in ("lora", "reft"):
        if getattr(entry, name) and isinstance(adapter, AdapterKind) and name not in type(adapter).model_fields:
            raise ConfigError(f"{where}: has no use for the section {name!r} without `adapter: {name}`")
    effective = getattr(method, "effective_head", entry.head)
    if entry.head is not None and effective != entry.head:
        raise ConfigError(f"{where}: head: {entry.head}: this method's head is always {effective!r}; leave it out")


def _kind(value: Any, sections: MethodSections, where: str) -> AdapterKind:
    """Return the adapter kind that a method's entry names, or its default one, with the sections that it declares.

    Raises:
        ConfigError: there is no such kind, or one of its fields is wrong.
    """
    default = isinstance(value, AdapterKind)
    try:
        kind = parse_kind(value.name if default else value, sections)
    except Mistakes as error:
        raise ConfigError("\n".join(f"{where}.{line}" for line in error.lines)) from None
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
    if not isinstance(kind, AdapterKind):
        raise ConfigError(f"{where}: expected the name of an adapter kind or a mapping with `class`, got {value!r}")
    return kind


def _find(entry: MethodConfig, where: str) -> type[Any]:
    """Return the class of a built-in method, or the user's own; both must be complete."""
    try:
        found: Any = METHODS.find(entry.name) if entry.name is not None else import_class(entry.class_ or "")
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
    missing = [name for name in _FUNCTIONS if not callable(getattr(found, name, None))]
    if missing or not dataclasses.is_dataclass(found) or not isinstance(found, type):
        raise ConfigError(
            f"{where}: {entry.name or entry.class_} must be a dataclass with the functions of fedray.methods.protocol."
            f"FederatedMethod; missing: {choices(missing) or '@dataclass(frozen=True)'}"
        )
    return found


_FUNCTIONS = [name for name in vars(FederatedMethod) if not name.startswith("_")]
