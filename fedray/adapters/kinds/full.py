"""`adapter: full`: full fine-tuning."""

from typing import ClassVar

from torch import nn

from fedray.adapters.adapter import Adapter
from fedray.adapters.full import attach_full
from fedray.adapters.kind import AdapterKind


class FullKind(AdapterKind):
    """Every parameter of the base model."""

    name: ClassVar[str] = "full"
    group: ClassVar[str] = "full"

    def attach(self, model: nn.Module) -> Adapter:
        return attach_full(model)


ENTRY = FullKind
