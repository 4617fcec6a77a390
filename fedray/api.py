"""`fedray.run`: one experiment from Python."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from fedray.config import Config, load_config
from fedray.experiment.prepare import prepare
from fedray.experiment.resume import resolve_run
from fedray.federation.events import Event
from fedray.results.run_result import RunResult
from fedray.runtime.driver import events
from fedray.storage.paths import StoragePath

SECTIONS = tuple(
    name
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
)


def run(
    config: Config | Mapping[str, Any] | str | Path,
    *,
    output: str | Path | None = None,
    resume: str | Path | None = None,
    on_event: Callable[[Event], None] | None = None,
    **overrides: Any,
) -> RunResult:
    """Run an experiment and wait for it.

    config: a path of a YAML file, a mapping, or a Config. output: folder of the run, which must be empty or not exist;
    default storage_path/NAME-TIME. resume: folder of a run to continue instead, with the same configuration; there may
    be more rounds. on_event: called with everything that happens. overrides: values of fields, as `rounds=10`,
    `train={"lr": 1e-3}` or `**{"train.lr": 1e-3}`.

    Raises:
        ConfigError: the experiment does not fit together; raised before any actor starts, but for what only the
            cluster's nodes know (room for actors, a folder that all of them see).
        FedrayError: it ended early; the message says why.

    >>> result = run("jobs/quickstart.yaml", rounds=2)      # doctest: +SKIP
    >>> result["fedalt"].personalised_mean                  # doctest: +SKIP
    """
    loaded, place = resolve_run(load_config(config, dict(_dotted(overrides))), output, resume)
    for event in start(loaded, place, resume is not None):
        if on_event is not None:
            on_event(event)
    return RunResult.load(place)


def start(config: Config, place: StoragePath, resume: bool = False) -> Iterator[Event]:
    """Check an experiment, run it in its folder, and yield what happens."""
    yield from events(prepare(config), place, resume)


def _dotted(overrides: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield dotted paths: train={"lr": 1e-3} changes one field of its section and keeps the others."""
    for name, value in overrides.items():
        if isinstance(value, Mapping) and name in SECTIONS:
            yield from ((f"{name}.{field}", entry) for field, entry in value.items())
        else:
            yield name, value
