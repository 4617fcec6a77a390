"""The folder and the configuration of a run, new or continued. A continued run may change only settings that do not
affect results."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedray.config import Config, Section, load_config, to_mapping, values_by_path
from fedray.errors import ConfigError
from fedray.experiment.run_folder import check_empty
from fedray.results.run_result import read_config
from fedray.storage.paths import StoragePath, in_job_folder, resolve_storage, timestamped

FREE = re.compile(
    r"name|rounds|runtime|storage_path|report|callbacks.*|tracking.*|checkpoint\..*|data\.cache_dir|"
    r"clients\.(tiers\.[^.]*\.)?actors|clients\.(max_failures|client_timeout_s)"
)
"""Fields that may change when a run is continued: none of them affects what a round computes."""


def resolve_run(config: Config, output: str | Path | None, resume: str | Path | None) -> tuple[Config, StoragePath]:
    """Return the configuration and the folder of a run.

    Args:
        output: folder of a new run; None means storage_path/NAME-TIME.
        resume: folder of a run to continue instead.

    Raises:
        ConfigError: the folder of a new run exists and is not empty, or the run to continue had another configuration.
    """
    if resume is not None:
        if output is not None:
            raise ConfigError("output: a run that is continued stays in its folder; leave out --output")
        place = StoragePath.of(resolve_storage(resume))
        return with_absolute_paths(continued(place, config)), place
    return with_absolute_paths(config), new_place(config, output)


def with_absolute_paths(config: Config) -> Config:
    """Return the configuration with absolute paths: other processes of the run have other current folders. In a job,
    they are in their node's copy of the job's folder, so paths stay relative to it."""
    return config if in_job_folder() else config.with_absolute_paths(Path.cwd())


def new_place(config: Config, output: str | Path | None) -> StoragePath:
    """Return the folder of a new run or sweep: `output`, or a new one, storage_path/NAME-TIME.

    Raises:
        ConfigError: the folder exists and is not empty, or cannot be created.
        StorageError: storage_path cannot be written.
    """
    place = StoragePath.of(resolve_storage(output or config.storage_path))
    if output:
        check_empty(place)
        return place
    return place.new_folder(timestamped(config.name))


def continued(place: StoragePath, given: Config) -> Config:
    """Return the configuration with which a run is continued: the given one, with the settings that the run measured at
    its start.

    Raises:
        ConfigError: the folder is not that of a run, or the configuration differs in a setting that affects results;
            the message lists the differences.
    """
    stored = read_config(place)
    ours, theirs = values_by_path(to_mapping(stored)), values_by_path(to_mapping(given))
    found = {path: ours[path] for path in ours if _found_out(path, given) and theirs.get(path) in (None, "auto")}
    # However paths are written, they are compared as what they mean here; runs of older versions have relative ones.
    compared = with_absolute_paths(stored), with_absolute_paths(given)
    lines = differences(*compared, lambda path: path in found or FREE.fullmatch(path) is not None)
    if lines:
        raise ConfigError(
            f"{place}: cannot be continued with another configuration; only rounds and settings that do not affect "
            "results may differ:\n" + "\n".join(lines)
        )
    if stored.rounds != given.rounds:
        _check_schedules(place, stored, given)
    return load_config(given, found)


def _check_schedules(place: StoragePath, stored: Config, given: Config) -> None:
    """Check that the learning rates of the finished rounds do not depend on the number of rounds.

    Raises:
        ConfigError: they do.
    """
    for entry in given.method:
        if given.section_for(entry).train.depends_on_rounds:
            raise ConfigError(
                f"{place}: cannot be continued with another number of rounds: stored is {stored.rounds}, given is "
                f"{given.rounds}, and the learning rates of {entry.key} follow a schedule over all rounds"
            )


def differences(stored: Section, given: Section, may_differ: Callable[[str], bool]) -> list[str]:
    """Return one line for each value in which a configuration differs from the stored one.

    Args:
        may_differ: whether a dotted path may differ.
    """
    ours, theirs = values_by_path(to_mapping(stored)), values_by_path(to_mapping(given))
    return [
        f"  {path}: stored is {ours.get(path)!r}, given is {theirs.get(path)!r}"
        for path in sorted({*ours, *theirs})
        if not _same(ours.get(path), theirs.get(path)) and not may_differ(path)
    ]


def _same(ours: Any, theirs: Any) -> bool:
    """Return whether two values are equal, or paths of one file."""
    paths = [value for value in (ours, theirs) if isinstance(value, str) and os.path.isabs(value)]
    return bool(ours == theirs) or (len(paths) == 2 and os.path.realpath(ours) == os.path.realpath(theirs))


def _found_out(path: str, given: Config) -> bool:
    """Return whether a field that is left out, or `auto`, follows from the actors' devices (`calibration`), so that a
    continued run keeps what it had."""
    if path in ("clients.example_seconds", "clients.threads"):
        return True
    return path.endswith("fuse") and not {None, "auto"}.isdisjoint(
        given.clients.tier(name).fuse for name in given.clients.tier_names
    )
