"""`adapter: reft`: representation fine-tuning: interventions on the blocks' outputs."""

from typing import ClassVar

from torch import nn

from fedray.adapters.adapter import Adapter
from fedray.adapters.kind import AdapterKind
from fedray.adapters.reft import attach_reft
from fedray.config import ReftSection


class ReftKind(AdapterKind):
    """Representation fine-tuning: interventions on the blocks' outputs."""

    name: ClassVar[str] = "reft"
    group: ClassVar[str] = "reft"
    reft: ReftSection = ReftSection()
    """The configuration's section `reft`."""

    def attach(self, model: nn.Module) -> Adapter:
        return attach_reft(model, self.reft)


ENTRY = ReftKind
