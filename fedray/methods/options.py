"""Options that only mean something together with another one."""

import dataclasses
from typing import Any

from fedray.errors import ConfigError


def needs(method: Any, option: str, condition: bool, remedy: str) -> None:
    """Refuse a changed option that would silently do nothing.

    method: a dataclass. condition: whether the option has an effect. remedy: what gives it one.

    Raises:
        ConfigError: the option is not at its default, and has no effect.
    """
    (default,) = (field.default for field in dataclasses.fields(method) if field.name == option)
    if not condition and getattr(method, option) != default:
        name = type(method).__name__.lower()
        raise ConfigError(f"{name}.{option}: has no effect without {remedy}; set that, or leave {option} out")
