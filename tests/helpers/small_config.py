"""The smallest configuration there is, and what its changes are told."""

from typing import Any

import pytest
import yaml

from fedray.config import load_config
from fedray.errors import ConfigError

SMALLEST: dict[str, Any] = {
    "rounds": 2,
    "method": "fedreft",
    "model": {"path": "package:somewhere"},
    "data": {"source": "docstrings"},
}


def with_section(path: str, value: object) -> dict[str, Any]:
    """Return the smallest configuration with one dotted key set."""
    mapping: dict[str, Any] = yaml.safe_load(yaml.safe_dump(SMALLEST))
    *parents, last = path.split(".")
    target = mapping
    for part in parents:
        target = target.setdefault(part, {})
    target[last] = value
    return mapping


def message_of(source: Any, overrides: dict[str, Any] | None = None) -> str:
    """Return the message with which a configuration is refused."""
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    return str(caught.value)
