"""From a configuration's entry to a method: a module of this package by its name, or a class of the user's own."""

import dataclasses
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError

from fedray.config import Config, MethodConfig, describe
from fedray.config.registry import Registry, import_class
from fedray.errors import ConfigError, choices, nearest
from fedray.methods.adapters import AdapterKind
from fedray.methods.protocol import AnyMethod, FederatedMethod

METHODS: Registry[Any] = Registry(
    "method", "fedray.methods", object, others=("adapters", "parts", "protocol", "registry")
)

SECTIONS = ("lora", "reft", "head")
"""Fields that are filled from the configuration's sections where a method declares them."""


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
    own = [name for name in fields if name not in SECTIONS]
    for name in entry.hyperparameters:
        if name not in own:
            raise ConfigError(f"{where}: unknown hyperparameter {name!r}{nearest(name, own)}; allowed: {choices(own)}")
    for name in ("lora", "reft"):
        if getattr(entry, name) and name not in fields:
            used = [section for section in SECTIONS if section in fields]
            raise ConfigError(f"{where}: has no use for the section {name!r}; it reads {choices(used)}")
    sections = config.section_for(entry, tier)
    filled = {name: getattr(sections, name) for name in SECTIONS if name in fields}
    try:
        method: AnyMethod = TypeAdapter(cls).validate_python({**entry.hyperparameters, **filled})
    except ValidationError as error:
        raise ConfigError("\n".join(f"{where}: {line}" for line in describe(error, Config))) from None
    for name, value in entry.hyperparameters.items():
        if isinstance(value, bool) and not isinstance(getattr(method, name), bool):  # pydantic reads `true` as 1
            raise ConfigError(f"{where}: {name}: expected a number, got {str(value).lower()}")
    _check_effect(method, entry, where)
    return method


def _check_effect(method: AnyMethod, entry: MethodConfig, where: str) -> None:
    """Refuse what this entry itself asks for and the method would not do.

    Raises:
        ConfigError: a section of the adapter that it does not train, a head that it treats otherwise.
    """
    adapter = getattr(method, "adapter", None)
    for name in ("lora", "reft"):
        if getattr(entry, name) and adapter in get_args(AdapterKind) and adapter != name:
            raise ConfigError(f"{where}: has no use for the section {name!r} without `adapter: {name}`")
    effective = getattr(method, "effective_head", entry.head)
    if entry.head is not None and effective != entry.head:
        raise ConfigError(f"{where}: head: {entry.head}: this method's head is always {effective!r}; leave it out")


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
