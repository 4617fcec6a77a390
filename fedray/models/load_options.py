"""How a model is built and loaded beyond what its transformers configuration says; it travels inside that."""

from dataclasses import asdict, dataclass
from typing import Self

from transformers.configuration_utils import PreTrainedConfig

from fedray.config import Pooling, Quantised

ATTRIBUTE = "fedray"
"""The field of a transformers configuration that holds them, as plain values, since configurations become JSON."""


@dataclass(frozen=True)
class LoadOptions:
    """What `architecture` decides and what building and loading the model follow.

    Attributes:
        pooling: how a classifier makes one vector of a text's tokens; `head`: as the family's own classifier does.
        normalised: whether that vector is scaled to a fixed length.
        new_head: whether the head's part that depends on the classes is drawn anew although the checkpoint has one.
        untied: parameters with values of their own in the checkpoint, although the configuration ties them to others.
        part_of: the whole model's architecture if this is the language part of one that also reads images or sound.
        quantised: how the linear layers of the base model are quantised; None: they are not.
    """

    pooling: Pooling = "head"
    normalised: bool = False
    new_head: bool = False
    untied: tuple[str, ...] = ()
    part_of: str = ""
    quantised: Quantised | None = None

    @classmethod
    def of(cls, arch: PreTrainedConfig) -> Self:
        """Return what the configuration holds, else the defaults."""
        fields = dict(getattr(arch, ATTRIBUTE, {}))
        return cls(**{**fields, "untied": tuple(fields.get("untied", ()))})

    def store(self, arch: PreTrainedConfig) -> None:
        """Put it into the configuration."""
        setattr(arch, ATTRIBUTE, {name: value for name, value in asdict(self).items() if value is not None})
