"""`adapter: lora`: LoRA on linear layers."""

from typing import ClassVar, Literal

from torch import nn

from fedray.adapters.adapter import Adapter
from fedray.adapters.kind import AdapterKind
from fedray.adapters.lora import attach_lora
from fedray.config import LoraSection


class LoraKind(AdapterKind):
    """LoRA on linear layers."""

    group: ClassVar[str] = "lora"
    name: Literal["lora"] = "lora"
    lora: LoraSection = LoraSection()

    def attach(self, model: nn.Module) -> Adapter:
        return attach_lora(model, self.lora)


ENTRY = LoraKind
LORA = LoraKind()
"""The kind of methods whose `adapter` is left out."""
