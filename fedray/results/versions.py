"""The versions of the packages with which a run was made, which it writes to versions.json."""

import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from fedray.storage.paths import StoragePath

PACKAGES = (
    "fedray",
    "torch",
    "transformers",
    "peft",
    "pyreft",
    "pyvene",
    "deepspeed",
    "bitsandbytes",
    "ray",
    "datasets",
    "numpy",
)
"""Those that decide what a run computes."""


def installed_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that are installed here."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_versions(place: StoragePath, durable: bool = True) -> None:
    """Write versions.json: a list with one entry for each process that ran the experiment with other versions.

    Raises:
        StorageError: it cannot be written.
    """
    before, now = _entries(place), installed_versions()
    if not before or before[-1] != now:
        (place / "versions.json").write((json.dumps([*before, now], indent=1) + "\n").encode(), durable)


def versions_of(place: StoragePath) -> tuple[Mapping[str, str], str]:
    """Return the versions of a run, and what to know about them, for a title."""
    entries = _entries(place)
    if not entries:
        return installed_versions(), " (of this report; the run recorded none)"
    changed = f" (the last of {len(entries)}; the run was continued with others)" if len(entries) > 1 else ""
    return entries[-1], changed


def _entries(place: StoragePath) -> list[dict[str, str]]:
    """Return what is in versions.json; an unreadable file counts as none."""
    file = place / "versions.json"
    try:
        found = json.loads(file.read()) if file.is_file() else []
    except (OSError, ValueError):
        return []
    return [dict(entry) for entry in found] if isinstance(found, list) else []
