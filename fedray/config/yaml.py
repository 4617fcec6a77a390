"""The only YAML parser. YAML 1.1 reads 3e-4 as text and keeps the last of two equal keys; this one does neither."""

import re
from typing import Any

import yaml

from fedray.errors import ConfigError, one_line


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 3e-4 and 1e5 as numbers (YAML 1.1 wants a dot and a sign) and refuses double keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, list | dict):
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} as a key", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which `_Loader` would read as a number, such as the git revision 1234e56."""


MOST_VALUES = 1_000_000
"""Of a document."""

_NUMBER = re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+0123456789."))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+0123456789."))


def parse_yaml(text: str, where: str) -> Any:
    """Read one YAML document.

    Raises:
        ConfigError: it is not YAML; the message has line and column.
    """
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _values(node, {}) > MOST_VALUES:
            raise ValueError(f"more than {MOST_VALUES:,} values, with every alias written out")
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not valid YAML: {one_line(error)}") from None
    finally:
        if loader is not None:
            loader.dispose()


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """Return how many values a node has when its aliases are written out: ten lines can stand for a billion.

    Raises:
        ValueError: a node contains itself.
    """
    if (found := known.get(id(node))) is not None:
        if not found:
            raise ValueError(f"a value contains itself:{node.start_mark}")
        return found
    known[id(node)] = 0
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    known[id(node)] = 1 + sum(_values(child, known) for child in children)
    return known[id(node)]


def to_yaml(value: Any) -> str:
    """Return plain values as YAML that `parse_yaml` reads back to equal ones."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
