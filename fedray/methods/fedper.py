"""FedPer (Arivazhagan et al., arXiv 1912.00818): FedAvg of the body, and a head that each client trains and keeps."""

from dataclasses import dataclass

from torch import nn

from fedray.adapters.adapter import Adapter
from fedray.config import Head
from fedray.methods.fedavg import FedAvg
from fedray.methods.parts import heads


@dataclass(frozen=True)
class FedPer(FedAvg):
    """FedAvg with `head: local`, whatever `head` says for the other methods."""

    head: Head = "local"

    @property
    def effective_head(self) -> Head:
        return "local"

    def attach(self, model: nn.Module) -> Adapter:
        adapter = super().attach(model)
        heads.require_head(self.name, adapter)
        return adapter


ENTRY = FedPer
