"""Names of clients."""

import re
from collections.abc import Sequence

from fedray.types import ClientId


def numbered(count: int) -> list[ClientId]:
    """Return client_000, client_001, ...: as wide as sorting by name needs."""
    width = max(3, len(str(count - 1)))
    return [f"client_{index:0{width}d}" for index in range(count)]


def safe_names(values: Sequence[str]) -> list[ClientId]:
    """Return a name per value that is safe as a file name, also where case does not count; names stay unique."""
    taken: set[str] = set()
    names = []
    for value in values:
        base = re.sub(r"[^A-Za-z0-9._-]+", "_", value).strip("._-")[:80] or "unnamed"
        name, number = base, 1
        while name.casefold() in taken:
            number += 1
            name = f"{base}_{number}"
        taken.add(name.casefold())
        names.append(name)
    return names
