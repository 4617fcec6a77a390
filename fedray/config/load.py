"""From a file, a mapping or the command line to a checked configuration, and back to YAML."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError

from fedray.config.experiment import Config
from fedray.config.overrides import override_value, set_value
from fedray.config.section import Section, describe
from fedray.config.sweep import SweepConfig
from fedray.config.yaml import parse_yaml, to_yaml
from fedray.errors import ConfigError

Kind = TypeVar("Kind", bound=Section)

LARGEST = 10_000_000
"""Bytes of a configuration file."""


def load_config(source: Config | Mapping[str, Any] | str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read a configuration from a file, a mapping or another configuration, and apply dotted overrides.

    overrides: {"section.key": value}; the path of a list element is its index ("method.0.head").

    Raises:
        ConfigError: missing file, malformed YAML, unknown key, wrong type, out of range. The message says where, what
            came, what is allowed, and the nearest valid name.
    """
    where, raw = _read(source)
    if "base" in raw and "space" in raw:
        raise ConfigError(
            f"{where}: this is a sweep (`base`, `space`), and one experiment is expected; start it with `fedray sweep`"
        )
    return _checked(Config, where, raw, overrides or {})


def load_sweep(
    source: SweepConfig | Mapping[str, Any] | str | Path, overrides: Mapping[str, Any] | None = None
) -> SweepConfig:
    """Read a sweep as `load_config` reads an experiment. Its `base` may be a path, from the folder of the sweep's file.

    Raises:
        ConfigError: as `load_config`; of the base, only that it cannot be read.
    """
    where, raw = _read(source)
    if "method" in raw and "base" not in raw:
        raise ConfigError(
            f"{where}: this is one experiment, and a sweep (`base`, `space`) is expected; start it with `fedray run`"
        )
    overrides = dict(overrides or {})
    for path in [path for path in overrides if path.startswith("space.")]:  # what follows is one key, dots and all
        if isinstance(raw.setdefault("space", {}), dict):
            raw["space"][path.removeprefix("space.")] = _plain(
                override_value(SweepConfig, raw, path, overrides.pop(path))
            )
    base = raw.get("base")
    if isinstance(base, str):
        raw["base"] = _read(base if isinstance(source, Mapping) else Path(where).parent / base)[1]
    return _checked(SweepConfig, where, raw, overrides)


def _read(source: Section | Mapping[str, Any] | str | Path) -> tuple[str, dict[str, Any]]:
    """Return what messages call a source, and its values."""
    if isinstance(source, Section):
        where, raw = "configuration", to_mapping(source)
    elif isinstance(source, Mapping):
        where, raw = "configuration", _plain(source)
    else:
        where = str(source)
        try:
            if (size := Path(source).stat().st_size) > LARGEST:
                raise ConfigError(f"{where}: {size} bytes; a configuration has at most {LARGEST}")
            raw = parse_yaml(Path(source).read_text(encoding="utf-8"), where)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where}: cannot be read: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: expected a mapping of sections, got {type(raw).__name__}")
    return where, raw


def _checked(kind: type[Kind], where: str, raw: dict[str, Any], overrides: Mapping[str, Any]) -> Kind:
    for path, value in overrides.items():
        set_value(raw, path, _plain(override_value(kind, raw, path, value)))
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{where}: {line}" for line in describe(error, kind))) from None


def values_by_path(value: Any, path: str = "") -> dict[str, Any]:
    """Return the values of a nested mapping by dotted path. Elements of lists are addressed by index; an empty list or
    mapping is a value."""
    entries: Iterable[tuple[Any, Any]]
    if isinstance(value, Mapping) and value:
        entries = value.items()
    elif isinstance(value, list) and value:
        entries = enumerate(value)
    else:
        return {path: value}
    return {
        name: leaf
        for key, entry in entries
        for name, leaf in values_by_path(entry, f"{path}.{key}" if path else str(key)).items()
    }


def to_mapping(config: Section) -> dict[str, Any]:
    """Return a configuration as plain YAML values."""
    return config.model_dump(mode="json", by_alias=True)


def dump_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML that `load_config` reads back to an equal one."""
    return to_yaml(to_mapping(config))


def _plain(value: Any) -> Any:
    """Return a copy of a value from Python as YAML could have held it.

    Raises:
        ConfigError: YAML could not have held it.
    """
    if isinstance(value, BaseModel):
        return to_mapping(value) if isinstance(value, Section) else value.model_dump(mode="json", by_alias=True)
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, str | int | float):
        return value
    raise ConfigError(
        f"configuration: {value!r} is of type {type(value).__name__}; allowed: text, numbers, lists, mappings, null"
    )
