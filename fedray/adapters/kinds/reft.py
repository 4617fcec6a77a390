"""`adapter: reft`: representation fine-tuning: interventions on the blocks' outputs."""

from typing import ClassVar

from torch import nn

from fedray.adapters.adapter import Adapter
from fedray.adapters.draws import draw_reft
from fedray.adapters.kind import AdapterKind
from fedray.adapters.layout import Layout
from fedray.adapters.mixers import Mixer
from fedray.adapters.reft import attach_reft, draw_idle
from fedray.config import ReftSection
from fedray.randomness import Key
from fedray.types import Vector


class ReftKind(AdapterKind):
    """Representation fine-tuning: interventions on the blocks' outputs."""

    name: ClassVar[str] = "reft"
    group: ClassVar[str] = "reft"
    reft: ReftSection = ReftSection()
    """The configuration's section `reft`."""

    def attach(self, model: nn.Module) -> Adapter:
        return attach_reft(model, self.reft)

    def attach_mixed(self, model: nn.Module, mixer: Mixer) -> Adapter:
        return attach_reft(model, self.reft, mixer=mixer)

    def draw(self, layout: Layout, seed: int, purpose: str, *key: Key) -> Vector:
        return draw_reft(layout, seed, purpose, *key)

    def idle(self, layout: Layout) -> Vector:
        return draw_idle(self.reft.kind, layout)


ENTRY = ReftKind
