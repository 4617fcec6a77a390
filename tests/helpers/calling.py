"""A callback that is one function."""

from collections.abc import Callable
from typing import Any

from fedray.federation.events import Callback


class Calling(Callback):
    """Calls a function with every event."""

    def __init__(self, function: Callable[[Any], None]):
        self._function = function

    def on_event(self, event: Any) -> None:
        self._function(event)
