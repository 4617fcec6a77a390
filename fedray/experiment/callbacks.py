"""The callbacks that a configuration names."""

from collections.abc import Sequence

from fedray.config import CallbackConfig
from fedray.config.registry import import_class
from fedray.errors import ConfigError
from fedray.federation.events import Callback


def build_callbacks(entries: Sequence[CallbackConfig]) -> list[Callback]:
    """Return new callbacks, each made with the fields of its entry.

    Raises:
        ConfigError: a class cannot be imported, is not a `Callback`, or does not accept these fields.
    """
    built = []
    for index, entry in enumerate(entries):
        where = f"callbacks.{index}"
        try:
            cls = import_class(entry.class_)
            if not (isinstance(cls, type) and issubclass(cls, Callback)):
                raise ValueError(f"{entry.class_} must be a class derived from fedray.Callback")
            built.append(cls(**(entry.model_extra or {})))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{where}: {error}") from None
    return built
