"""Adapter kinds: what a method without an adapter of its own inserts into the base model and trains.

A kind is a frozen section of the configuration (`adapter: lora`, or `adapter: {class: my_kind.MyKind, width: 4}`). It
may declare the fields `lora` (LoraSection) and `reft` (ReftSection), which are then filled from the configuration's
sections, with what a tier can hold; all other fields are its own. It says which group of parameters it trains and
attaches an adapter with that group.

Clients train in one step (`clients.fuse`) if all of the adapter's parameters belong to linear layers or interventions
(`fedray.adapters.stacked`), and one by one otherwise.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from fedray.adapters.adapter import Adapter
from fedray.adapters.layout import Layout
from fedray.adapters.mixers import Mixer
from fedray.config import MethodSections
from fedray.config.option import Option
from fedray.config.registry import Registry
from fedray.errors import ConfigError
from fedray.randomness import Key
from fedray.types import Vector

SECTIONS = ("lora", "reft")
"""Fields that are filled from the configuration's sections where a kind declares them."""


class AdapterKind(Option):
    """Base class of all adapter kinds.

    Attributes:
        group: name of the group of parameters that is trained and, depending on the method, sent.
    """

    must_define: ClassVar[tuple[str, ...]] = ("attach",)
    group: ClassVar[str]

    @classmethod
    def registry(cls) -> Registry[Any]:
        return ADAPTER_KINDS

    def attach(self, model: nn.Module) -> Adapter:
        """Insert the adapter into a model, in place, and freeze everything else.

        Args:
            model: a transformers model, also on the meta device, where layouts and counts are all that is needed.

        Returns:
            The adapter, with the group `group` and, where the model has a task head, the group "head".
        """
        raise NotImplementedError

    def attach_mixed(self, model: nn.Module, mixer: Mixer) -> Adapter:
        """As `attach`, with a second, frozen adapter of the same size in the group "rest", which does nothing at first.

        Args:
            mixer: what weighs the two (`fedray.adapters.mixers`); with `adaptive` the group "mixer" trains.

        Raises:
            ConfigError: the kind has no second adapter.
        """
        raise ConfigError(f"adapter: {self.label} cannot be mixed with a second, frozen one; use lora or reft")

    def draw(self, layout: Layout, seed: int, purpose: str, *key: Key) -> Vector:
        """Return first values of the group `group`, keyed by (seed, purpose, key); of kinds with `attach_mixed`."""
        raise NotImplementedError(f"{type(self).__name__} must define draw(layout, seed, purpose, *key)")

    def idle(self, layout: Layout) -> Vector:
        """Return values of the group "rest" with which it does nothing; of kinds with `attach_mixed`."""
        raise NotImplementedError(f"{type(self).__name__} must define idle(layout)")


ADAPTER_KINDS = Registry("adapter kind", "fedray.adapters.kinds", AdapterKind)


def parse_kind(value: Any, sections: MethodSections) -> Any:
    """Return the checked kind that a value of the configuration describes.

    Args:
        value: the name of a kind, or a mapping with `name` or `class` and the kind's own fields.
        sections: fill the fields `lora` and `reft` of kinds that declare them.

    Raises:
        ValueError: there is no such kind, its class is no kind, or (`Mistakes`) a field is wrong.
    """
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping):
        return value
    declared = [name for name in SECTIONS if name in ADAPTER_KINDS.select(value).model_fields]
    return ADAPTER_KINDS.parse({**value, **{name: getattr(sections, name) for name in declared}})
