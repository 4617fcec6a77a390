"""Adapters are never sent, and the task head is averaged as in FedAvg.

This control shows what a method gains beyond sharing the head.
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
