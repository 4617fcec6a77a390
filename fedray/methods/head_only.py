"""Adapters are never sent, and the task head is averaged as in FedAvg.

The control that shows what a method's adapter gains: the difference to this one is not the shared head's.
"""

from dataclasses import dataclass

from torch import nn

from fedray.adapters.adapter import Adapter
from fedray.config import Head
from fedray.methods.local import LocalOnly
from fedray.methods.parts import heads


@dataclass(frozen=True)
class HeadOnly(LocalOnly):
    """Local training with a shared head; the head is shared whatever `head` says for the other methods.

    Attributes:
        adapter: what the clients train and keep.
    """

    @property
    def effective_head(self) -> Head:
        return "shared"

    def attach(self, model: nn.Module) -> Adapter:
        adapter = super().attach(model)
        heads.require_head("head_only", adapter)
        return adapter


ENTRY = HeadOnly
