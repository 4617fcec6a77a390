"""`adapter: full`: full fine-tuning."""

from typing import ClassVar, Literal

from torch import nn

from fedray.adapters.adapter import Adapter
from fedray.adapters.full import attach_full
from fedray.adapters.kind import AdapterKind


class FullKind(AdapterKind):
    """Every parameter of the base model."""

    group: ClassVar[str] = "full"
    name: Literal["full"] = "full"

    def attach(self, model: nn.Module) -> Adapter:
        return attach_full(model)


ENTRY = FullKind
