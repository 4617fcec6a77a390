"""Values of the command line, as `section.key=value`: what the value is depends on the type of its field.

A field of text takes the value as it is written: `data.prompt={text}`, `model.revision=1234e56`. Everything else is
YAML: numbers, lists, mappings, sections.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator

from fedray.config.experiment import Config
from fedray.config.registry import Registry
from fedray.config.sweep import SweepConfig
from fedray.config.yaml import parse_yaml
from fedray.errors import ConfigError


@dataclass(frozen=True)
class Argument:
    """A value as it was written on the command line."""

    text: str


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """Turn `section.key=value` arguments into overrides for `load_config` and `load_sweep`.

    Raises:
        ConfigError: an argument without `=`.
    """
    overrides = {}
    for argument in arguments:
        path, equals, value = argument.partition("=")
        if not equals or not path:
            raise ConfigError(
                f"override {argument!r}: expected section.key=value, for example rounds=10 or train.lr=1e-3"
            )
        overrides[path] = Argument(value)
    return overrides


def override_value(kind: type[BaseModel], raw: Mapping[str, Any], path: str, value: Any) -> Any:
    """Return the value of an override; an `Argument` is read as the type of its field asks.

    Args:
        kind: the class of the whole configuration, whose values are `raw`.

    Raises:
        ConfigError: the field needs YAML, and this is none.
    """
    if not isinstance(value, Argument):
        return value
    parts = path.split(".")
    if kind is SweepConfig and parts[0] == "base" and isinstance(raw.get("base"), Mapping):
        kind, raw, parts = Config, raw["base"], parts[1:]
    types = [single for found in _types_at(kind, raw, parts) for single in _singles(found)]
    names = {option for single in types if get_origin(single) is Literal for option in get_args(single)}
    if value.text in names:
        return value.text
    if types and all(single in (str, NoneType) or get_origin(single) is Literal for single in types):
        return None if NoneType in types and value.text in ("", "null") else value.text
    try:
        found = parse_yaml(value.text, f"override {path}")
    except ConfigError:
        if not types or str in types or Any in types:  # without types: the field is unknown, which is the real mistake
            return value.text
        raise
    takes_scalars = {bool, int, float, NoneType, Any} & set(types)
    return value.text if str in types and not takes_scalars and not isinstance(found, list | dict) else found


def set_value(raw: dict[str, Any], path: str, value: Any) -> None:
    """Set one dotted path in a nested mapping, in place.

    Raises:
        ConfigError: the path leads through a plain value, or to a place that a list does not have.
    """
    target: Any = raw
    *parents, last = path.split(".")
    for part in parents:
        if isinstance(target, list):
            if not part.isdigit() or int(part) >= len(target):
                raise ConfigError(f"override {path}: {part!r} is not an index below {len(target)}")
            target = target[int(part)]
        elif isinstance(target, dict):
            target = target.setdefault(part, {})
        else:
            raise ConfigError(f"override {path}: {part!r} lies inside a plain value, not a section")
    if isinstance(target, list) and last.isdigit() and int(last) < len(target):
        target[int(last)] = value
    elif isinstance(target, dict):
        target[last] = value
    else:
        raise ConfigError(f"override {path}: {last!r} lies inside a plain value, not a section")


def _types_at(annotation: Any, value: Any, parts: list[str]) -> Iterator[Any]:
    """Yield the types that a path below a value of type `annotation` may have; none if there is no such field.

    Args:
        value: the present value, which says which entry of a registry it is.
    """
    if not parts:
        yield annotation
        return
    part, *rest = parts
    registry = _registry(annotation)
    for single in _singles(annotation):
        below = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(single, type) and issubclass(single, BaseModel):
            for section in [single] if registry is None else _entries(registry, value, part):
                for name, field in section.model_fields.items():
                    if part in (name, field.alias):
                        metadata = tuple(field.metadata)
                        inner = Annotated[field.annotation, *metadata] if metadata else field.annotation
                        yield from _types_at(inner, below, rest)
        elif get_origin(single) is dict:
            yield from _types_at(get_args(single)[1], below, rest)
        elif get_origin(single) in (tuple, list) and part.isdigit():
            held = value[int(part)] if isinstance(value, list) and int(part) < len(value) else None
            yield from _types_at(get_args(single)[0], held, rest)
        elif single is Any:
            yield Any


def _singles(annotation: Any) -> Iterator[Any]:
    """Yield the members of a union, without what annotates them."""
    if get_origin(annotation) is Annotated:
        yield from _singles(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for member in get_args(annotation):
            yield from _singles(member)
    else:
        yield annotation


def _registry(annotation: Any) -> Registry[Any] | None:
    """Return the registry that reads values of this type; None if it is a plain one."""
    if get_origin(annotation) in (Union, UnionType):
        return next(filter(None, map(_registry, get_args(annotation))), None)
    if get_origin(annotation) is not Annotated:
        return None
    inner, *metadata = get_args(annotation)
    readers = [getattr(entry.func, "__self__", None) for entry in metadata if isinstance(entry, BeforeValidator)]
    return next((reader for reader in readers if isinstance(reader, Registry)), None) or _registry(inner)


def _entries(registry: Registry[Any], value: Any, field: str) -> list[Any]:
    """Return the classes of which a section with this field may be: the one that its value selects, or else every entry
    that has the field."""
    given = value if isinstance(value, Mapping) else {registry.key: value} if isinstance(value, str) else {}
    try:
        selected = registry.select(given)
    except ValueError:  # it will be reported when the section is read
        selected = registry.base
    if any(field in (name, entry.alias) for name, entry in selected.model_fields.items()):
        return [selected]
    return [registry.find(name) for name in registry.names]
