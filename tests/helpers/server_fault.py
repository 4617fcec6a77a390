"""FedAvg whose server raises an exception once clients have trained, and not yet in the round on shapes."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedray.methods.bases.shared_adapter import GlobalAdapter
from fedray.methods.fedavg import FedAvg, Server
from fedray.methods.protocol import Metrics, Uploaded


@dataclass(frozen=True)
class BrokenServer(FedAvg):
    def aggregate_train(self, server: Server, updates: Sequence[Uploaded[GlobalAdapter]]) -> tuple[Server, Metrics]:
        if any(update.payload.adapter.any() for update in updates):
            raise KeyError("no such round")
        return super().aggregate_train(server, updates)
