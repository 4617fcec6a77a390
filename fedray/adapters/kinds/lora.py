"""`adapter: lora`: LoRA on linear layers."""

from typing import ClassVar

from torch import nn

from fedray.adapters.adapter import Adapter
from fedray.adapters.kind import AdapterKind
from fedray.adapters.lora import attach_lora
from fedray.config import LoraSection


class LoraKind(AdapterKind):
    """LoRA on linear layers."""

    name: ClassVar[str] = "lora"
    group: ClassVar[str] = "lora"
    lora: LoraSection = LoraSection()
    """The configuration's section `lora`."""

    def attach(self, model: nn.Module) -> Adapter:
        return attach_lora(model, self.lora)


ENTRY = LoraKind
LORA = LoraKind()
"""The kind of methods whose `adapter` is left out."""
