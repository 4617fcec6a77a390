"""`fedray.run`: one experiment from Python."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import BaseModel

from fedray.config import Config, load_config
from fedray.driver import default_path, events
from fedray.experiment import Event
from fedray.prepare import prepare
from fedray.tracking import Summary, check_free

SECTIONS = tuple(
    name
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
)


@dataclass(frozen=True)
class RunResult:
    """A finished run. path: its folder. summaries: one per method, in the configuration's order."""

    path: Path
    summaries: tuple[Summary, ...]

    @classmethod
    def load(cls, path: str | Path) -> "RunResult":
        """Read the result of an earlier run from its folder."""
        entries = json.loads((Path(path) / "summary.json").read_text(encoding="utf-8"))
        return cls(Path(path), tuple(Summary(**entry) for entry in entries))

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
        """Return rounds.parquet: one row per method and round."""
        return pd.read_parquet(self.path / "rounds.parquet")

    def clients(self) -> pd.DataFrame:
        """Return clients.parquet: one row per method, round and client."""
        return pd.read_parquet(self.path / "clients.parquet")

    def memory(self) -> pd.DataFrame:
        """Return memory.parquet: one row per method and tier."""
        return pd.read_parquet(self.path / "memory.parquet")


def run(
    config: Config | Mapping[str, Any] | str | Path,
    *,
    output: str | Path | None = None,
    on_event: Callable[[Event], None] | None = None,
    **overrides: Any,
) -> RunResult:
    """Run an experiment and wait for it.

    config: a path of a YAML file, a mapping, or a Config. output: folder of the run, which must be empty or not exist;
    default storage_path/NAME-TIME. on_event: called with everything that happens. overrides: values of fields, as
    `rounds=10`, `train={"lr": 1e-3}` or `**{"train.lr": 1e-3}`.

    Raises:
        ConfigError: the experiment does not fit together; raised before any actor starts, but for what only the
            cluster's nodes know (room for actors, a folder that all of them see).
        FedrayError: it ended early; the message says why.

    >>> result = run("jobs/quickstart.yaml", rounds=2)      # doctest: +SKIP
    >>> result["fedalt"].personalised_mean                  # doctest: +SKIP
    """
    loaded = load_config(config, dict(_dotted(overrides)))
    path = run_folder(loaded, output)
    for event in start(loaded, path):
        if on_event is not None:
            on_event(event)
    return RunResult.load(path)


def run_folder(config: Config, output: str | Path | None) -> Path:
    """Return the folder of a new run.

    Raises:
        ConfigError: it exists and is not empty.
    """
    path = Path(output) if output else default_path(config, datetime.now().strftime("%Y%m%d-%H%M%S"))
    check_free(path)
    return path


def start(config: Config, path: Path) -> Iterator[Event]:
    """Check an experiment, run it into the folder `path`, and yield what happens."""
    yield from events(prepare(config), path)


def _dotted(overrides: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield dotted paths: train={"lr": 1e-3} changes one field of its section and keeps the others."""
    for name, value in overrides.items():
        if isinstance(value, Mapping) and name in SECTIONS:
            yield from ((f"{name}.{field}", entry) for field, entry in value.items())
        else:
            yield name, value
