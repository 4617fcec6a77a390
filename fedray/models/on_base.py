"""Classes of models that consist of a base model of any family and of something that reads its hidden states."""

import inspect
from functools import cache
from typing import Any

from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig


class OnBase:
    """What such classes have in common. A part of a class (`class_on_base`) derives from it."""

    base_class: type[PreTrainedModel]
    base_model_prefix: str

    def __init__(self: Any, config: PreTrainedConfig):
        super().__init__(config)  # type: ignore[call-arg]
        has_pooler = "add_pooling_layer" in inspect.signature(self.base_class.__init__).parameters
        unused = {"add_pooling_layer": False} if has_pooler else {}
        setattr(self, self.base_model_prefix, self.base_class(config, **unused))
        self.add_head(config)
        self.post_init()

    def add_head(self: Any, config: PreTrainedConfig) -> None:
        """Add the modules that read the hidden states."""
        raise NotImplementedError


@cache
def class_on_base(part: Any, base: Any) -> type[PreTrainedModel]:
    """Return the class that puts a part (a subclass of `OnBase`) on a base model's class.

    It inherits from the base model's family: weights have the names of the family's checkpoints, and attention and
    checkpointing are as the family supports them.
    """
    family: Any = next(parent for parent in base.__mro__[1:] if issubclass(parent, PreTrainedModel))
    fields = {"base_class": base, "base_model_prefix": family.base_model_prefix or "model"}
    return type(f"{base.__name__}{part.__name__}", (part, family), fields)
