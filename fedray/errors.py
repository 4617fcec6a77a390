"""Errors of fedray, one class per scenario. Every message says what was expected, what was given, and what to change.

All of them survive pickling, because Ray sends exceptions between processes: the message is the only argument.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class FedrayError(Exception):
    """Base class of errors that fedray reports. The command line prints the message without a traceback; exit code
    1."""


class ConfigError(FedrayError):
    """The configuration, or something that it names, cannot be used. It is raised before any actor starts; exit code
    2."""


class DataError(ConfigError):
    """A data source, a column, a label or a partition does not match the configuration; exit code 2."""


class ComparisonError(ConfigError):
    """Runs cannot be compared, for example because their data or budgets differ; exit code 2."""


class TrainingError(FedrayError):
    """Local training failed, for example because of a loss that is not finite or a client without training examples;
    exit code 1."""


class StateError(FedrayError):
    """A client's state cannot be written or read; exit code 1."""


class StorageError(StateError):
    """A file or folder of a run cannot be written, for example because the disk is full; once it can, the run continues
    from its last checkpoint. Exit code 1."""


class ClientFailure(FedrayError):
    """A client failed more often than `clients.max_failures` allows; the message gives the last cause. Exit code 1."""


def cannot_cache(folder: object, error: Exception) -> ConfigError:
    """Return what is said of a folder of `data.cache_dir` that cannot be written."""
    return ConfigError(
        f"data.cache_dir: {folder} cannot be written: {reason(error)}; make room there, or set it to another folder"
    )


def reason(error: Exception) -> str:
    """Return what the operating system says, without the number and the file's name."""
    return str(getattr(error, "strerror", None) or error)


def nearest(name: str, allowed: Iterable[object]) -> str:
    """Return " (did you mean 'x'?)" for the allowed name most similar to `name`, or "" if none is similar."""
    names = [str(a) for a in allowed]
    close = get_close_matches(str(name), names, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def choices(allowed: Iterable[object], limit: int = 20) -> str:
    """Return the allowed names as one readable list, cut off after `limit` names."""
    names = [str(a) for a in allowed]
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, ... ({len(names)} in all)"


def one_line(error: Exception) -> str:
    """Return an error's text as one line."""
    return " ".join(str(error).split()) or type(error).__name__
