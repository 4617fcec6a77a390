"""The callbacks of a run or a sweep: those that its configuration names, trackers included, and those that it is given.

Callbacks see what happens, in order, and may end the run by an exception; trackers never do.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fedray.config import CallbackConfig, Config, Tracker
from fedray.config.registry import import_class
from fedray.config.tracker import EndStatus
from fedray.errors import ConfigError, one_line
from fedray.experiment.run_folder import record_tracker_failure
from fedray.federation.events import Callback
from fedray.storage.paths import StoragePath
from fedray.tracking.callback import Tracking

log = logging.getLogger(__name__)


def build_callbacks(config: Config) -> list[Callback]:
    """Return new callbacks: one per tracker, and those of `callbacks`, each made with the fields of its entry.

    Raises:
        ConfigError: a class cannot be imported, is not a `Callback`, or does not accept these fields.
    """
    return [*_trackings(config.tracking), *(_built(index, entry) for index, entry in enumerate(config.callbacks))]


def _trackings(trackers: Sequence[Tracker]) -> Iterator[Tracking]:
    """Yield a callback per tracker; a second one of the same name gets a number."""
    seen: Counter[str] = Counter()
    for tracker in trackers:
        seen[tracker.label] += 1
        number = seen[tracker.label]
        key = tracker.label if number == 1 else f"{tracker.label}-{number}"
        yield Tracking(tracker, key, record_tracker_failure)


def _built(index: int, entry: CallbackConfig) -> Callback:
    try:
        cls = import_class(entry.class_)
        if not (isinstance(cls, type) and issubclass(cls, Callback)):
            raise ValueError(f"{entry.class_} must be a class derived from fedray.Callback")
        return cls(**(entry.model_extra or {}))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"callbacks.{index}: {error}") from None


def check_trackers(config: Config, place: StoragePath) -> None:
    """Check that each tracker can be used, as far as it is known before anything starts.

    Args:
        place: folder of the run or the sweep.

    Raises:
        ConfigError: one cannot; the message says what to install or to set.
    """
    for index, tracker in enumerate(config.tracking):
        try:
            tracker.check(place.local if place.filesystem is None else None)
        except Exception as error:  # a library that cannot be imported, too
            what = error if isinstance(error, ConfigError) else f"{tracker.label}: {type(error).__name__}: {error}"
            raise ConfigError(f"tracking.{index}: {what}") from error


@contextmanager
def notifying(
    callbacks: Sequence[Callback], finished: Callable[[EndStatus, str], Any]
) -> Iterator[Callable[[Any], None]]:
    """Yield a function that passes events on to all callbacks, for the duration of a run or a sweep.

    If there was an event, a last one follows at the end of the block, whether or not the block raises: by then the
    folder contains everything that the run leaves, and no other process writes to it.

    Args:
        finished: makes the last event from how the run ended, and why if it failed.
    """
    started = False

    def notify(event: Any) -> None:
        nonlocal started
        started = True
        for callback in callbacks:
            callback.on_event(event)

    try:
        yield notify
    except BaseException as error:
        if started:
            end = finished("failed", one_line(error)) if isinstance(error, Exception) else finished("stopped", "")
            _end(callbacks, end)
        raise
    if started:
        notify(finished("finished", ""))


def _end(callbacks: Sequence[Callback], event: Any) -> None:
    """Tell callbacks that a run failed; what they raise themselves must not hide why."""
    for callback in callbacks:
        try:
            callback.on_event(event)
        except Exception as error:
            log.warning("%s: %s: %s", type(callback).__name__, type(error).__name__, error)
