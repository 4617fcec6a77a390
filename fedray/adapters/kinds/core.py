"""`adapter: core`: a small trained matrix between fixed frames."""

from typing import ClassVar

from torch import nn

from fedray.adapters.adapter import Adapter
from fedray.adapters.kind import AdapterKind
from fedray.adapters.lora import attach_lora
from fedray.config import LoraSection


class CoreKind(AdapterKind):
    """y = W0 x + B R A x (LoRA-XS and Fed-SB, arXiv 2502.15436): R [r, r] trains; A's rows and B's columns are
    orthonormal and fixed. `lora.alpha` has no part in it: the branch is scaled by 1."""

    name: ClassVar[str] = "core"
    group: ClassVar[str] = "core"
    lora: LoraSection = LoraSection()
    """The configuration's section `lora`."""

    def attach(self, model: nn.Module) -> Adapter:
        return attach_lora(model, self.lora.model_copy(update={"alpha": float(self.lora.rank)}), core=True)


ENTRY = CoreKind
CORE = CoreKind()
"""The kind of methods whose `adapter` is left out."""
