"""What a tracker is, and how a configuration names one: `wandb`, or `{class: my_tracker.MyTracker, ...its fields}`.

The built-in trackers are the modules of `fedray.tracking.trackers`; each imports its library only in `open`. The
smallest tracker:

    from fedray.config import TrackedRun, Tracker, TrackerRun

    class Print(Tracker):
        def open(self, run: TrackedRun) -> TrackerRun:
            return Printing()

    class Printing(TrackerRun):
        def log(self, metrics, step):
            print(step, metrics)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, SerializeAsAny

from fedray.config.option import Option
from fedray.config.registry import Registry
from fedray.errors import ConfigError

EndStatus = Literal["finished", "failed", "stopped"]
"""How a run ended; `stopped` by the user or by a sweep's scheduler."""


FOLDER = "trackers"
"""Folder in a run's folder in which trackers keep what they write."""


@dataclass(frozen=True)
class TrackedRun:
    """A run, a trial of a sweep, or a sweep, as a tracker sees it.

    Attributes:
        name: of the run's folder; SWEEP/TRIAL for a trial.
        group: name of the sweep's folder, for its trials and for the sweep itself; empty otherwise.
        config: the resolved configuration.
        folder: the run's folder on this machine; None if it is elsewhere, as in an object store.
        id: `TrackerRun.id` of this run before it was interrupted; None if it is new.
        logged: how many rounds and final passes are logged already.
    """

    name: str
    group: str
    config: Mapping[str, Any]
    folder: Path | None
    id: str | None = None
    logged: int = 0


class TrackerRun:
    """A run in a tracker. It is used by one thread; other runs may be open at the same time.

    Attributes:
        id: by which the tracker finds the run again when it is continued.
    """

    id: str = ""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the metrics of one round of one method.

        Args:
            step: the round, from 1. Methods run one after another, so steps begin again with each.
        """
        raise NotImplementedError

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log a final table; its rows have the same columns."""

    def attach(self, path: Path) -> None:
        """Keep a file of the run, which may be gone afterwards."""

    def finish(self, status: EndStatus) -> None:
        """Close the run."""


class Tracker(Option):
    """Shows runs elsewhere. Fields of a subclass are its options.

    Attributes:
        package: the package that must be installed, if any.
        install: what to install to have it, as pip calls it; default the package.
    """

    package: ClassVar[str] = ""
    install: ClassVar[str] = ""

    @classmethod
    def registry(cls) -> Registry[Any]:
        return TRACKERS

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a class that could not be used.

        Raises:
            TypeError: it has no `open`.
        """
        super().__pydantic_init_subclass__(**kwargs)
        if cls.open is Tracker.open:
            raise TypeError(f"{cls.__name__}: has no function `open`")

    def check(self, folder: Path | None) -> None:
        """Check, before anything starts, what can be known of a mistake.

        Args:
            folder: as in `TrackedRun`.

        Raises:
            ConfigError: the tracker cannot be used.
        """
        if self.package and find_spec(self.package) is None:
            raise ConfigError(
                f"{self.label} needs the package {self.package}, which is not installed: "
                f"pip install '{self.install or self.package}'"
            )

    def open(self, run: TrackedRun) -> TrackerRun:
        """Begin a run, or continue the one with `run.id`."""
        raise NotImplementedError


TRACKERS = Registry("tracker", "fedray.tracking.trackers", Tracker)

TrackerOption = Annotated[SerializeAsAny[Tracker], BeforeValidator(TRACKERS.parse)]
"""A tracker as an entry of a configuration's list."""
