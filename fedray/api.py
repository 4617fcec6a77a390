"""`fedray.run`: one experiment from Python."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import BaseModel

from fedray.config import Config, load_config
from fedray.driver import events
from fedray.errors import ConfigError, StateError
from fedray.experiment import Event
from fedray.prepare import prepare
from fedray.run_folder import check_free, continued, read_summaries
from fedray.storage.paths import Place, in_storage, stamped
from fedray.storage.tables import read_table
from fedray.tracking import Summary

SECTIONS = tuple(
    name
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
)


@dataclass(frozen=True)
class RunResult:
    """A finished run. place: its folder. summaries: one per method, in the configuration's order."""

    place: Place
    summaries: tuple[Summary, ...]

    @classmethod
    def load(cls, where: str | Path | Place) -> "RunResult":
        """Read the result of an earlier run from its folder, a path or a URI.

        Raises:
            StateError: no method of it is finished, or the summary cannot be read.
        """
        place = Place.of(where)
        summaries = tuple(read_summaries(place))
        if not summaries:
            raise StateError(f"{place}: has no summary.json: no method is finished")
        return cls(place, summaries)

    @property
    def path(self) -> Path:
        """Its folder on this machine. Raises ValueError where it is elsewhere."""
        return self.place.local

    def __getitem__(self, method: str) -> Summary:
        """Return one method's summary. Raises KeyError, naming the methods there are."""
        found = {summary.method: summary for summary in self.summaries}
        if method not in found:
            raise KeyError(f"no method {method!r}; this run has {', '.join(found)}")
        return found[method]

    def to_pandas(self) -> pd.DataFrame:
        """Return the summaries, one row per method."""
        return pd.DataFrame([vars(summary) for summary in self.summaries])

    def rounds(self) -> pd.DataFrame:
        """Return rounds.parquet: one row per method and round. Raises StateError: it cannot be read."""
        return self._table("rounds")

    def clients(self) -> pd.DataFrame:
        """Return clients.parquet: one row per method, round and client. Raises StateError: it cannot be read."""
        return self._table("clients")

    def memory(self) -> pd.DataFrame:
        """Return memory.parquet: one row per method and tier. Raises StateError: it cannot be read."""
        return self._table("memory")

    def events(self) -> pd.DataFrame:
        """Return events.parquet, the ledger of what went wrong: one row per attempt that came to nothing. Raises
        StateError: it cannot be read."""
        return self._table("events", needed=False)

    def _table(self, name: str, needed: bool = True) -> pd.DataFrame:
        table = read_table(self.place, name)
        if needed and not table.num_columns:
            raise StateError(f"{self.place / f'{name}.parquet'}: is not there")
        frame: pd.DataFrame = table.to_pandas()
        return frame


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
    loaded, place = settle(load_config(config, dict(_dotted(overrides))), output, resume)
    for event in start(loaded, place, resume is not None):
        if on_event is not None:
            on_event(event)
    return RunResult.load(place)


def settle(config: Config, output: str | Path | None, resume: str | Path | None) -> tuple[Config, Place]:
    """Return the configuration and the folder of a new run, or of one that is continued.

    Raises:
        ConfigError: a new one's folder exists and is not empty, or what is continued had another configuration.
    """
    if resume is not None:
        if output is not None:
            raise ConfigError("output: a run that is continued stays in its folder; leave out --output")
        place = Place.of(in_storage(resume))
        return continued(place, config), place
    return config, new_place(config, output)


def new_place(config: Config, output: str | Path | None) -> Place:
    """Return the folder of something new: `output`, or storage_path/NAME-TIME.

    Raises:
        ConfigError: it exists and is not empty.
    """
    place = Place.of(in_storage(output or config.storage_path))
    place = place if output else place / stamped(config.name)
    check_free(place)
    return place


def start(config: Config, place: Place, resume: bool = False) -> Iterator[Event]:
    """Check an experiment, run it in its folder, and yield what happens."""
    yield from events(prepare(config), place, resume)


def _dotted(overrides: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield dotted paths: train={"lr": 1e-3} changes one field of its section and keeps the others."""
    for name, value in overrides.items():
        if isinstance(value, Mapping) and name in SECTIONS:
            yield from ((f"{name}.{field}", entry) for field, entry in value.items())
        else:
            yield name, value
