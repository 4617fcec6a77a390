"""Names of clients."""

from collections.abc import Sequence

from fedray.types import ClientId


def numbered(count: int) -> list[ClientId]:
    """Return client_000, client_001, ...: as wide as sorting by name needs."""
    width = max(3, len(str(count - 1)))
    return [f"client_{index:0{width}d}" for index in range(count)]


def unique_names(values: Sequence[str]) -> list[ClientId]:
    """Return a name per value: the value itself, with a number where it occurs again (boolq, boolq_2)."""
    taken: set[str] = set()
    names = []
    for value in values:
        name, number = value, 1
        while name in taken:
            number += 1
            name = f"{value}_{number}"
        taken.add(name)
        names.append(name)
    return names
