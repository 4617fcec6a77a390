"""`adapter: lora`: LoRA on linear layers."""

from typing import ClassVar

from torch import nn

from fedray.adapters.adapter import Adapter
from fedray.adapters.draws import draw_lora, draw_zeros
from fedray.adapters.kind import AdapterKind
from fedray.adapters.layout import Layout
from fedray.adapters.lora import attach_lora
from fedray.adapters.mixers import Mixer
from fedray.config import LoraSection
from fedray.randomness import Key
from fedray.types import Vector


class LoraKind(AdapterKind):
    """LoRA on linear layers."""

    name: ClassVar[str] = "lora"
    group: ClassVar[str] = "lora"
    lora: LoraSection = LoraSection()
    """The configuration's section `lora`."""

    def attach(self, model: nn.Module) -> Adapter:
        return attach_lora(model, self.lora)

    def attach_mixed(self, model: nn.Module, mixer: Mixer) -> Adapter:
        return attach_lora(model, self.lora, rest_rank=self.lora.rank, rest_dropout=True, mixer=mixer)

    def draw(self, layout: Layout, seed: int, purpose: str, *key: Key) -> Vector:
        return draw_lora(layout, seed, purpose, *key)

    def idle(self, layout: Layout) -> Vector:
        return draw_zeros(layout, 0)


ENTRY = LoraKind
LORA = LoraKind()
"""The kind of methods whose `adapter` is left out."""
