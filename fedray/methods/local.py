"""The two controls without which no comparison means anything.

Local: no communication at all; every client trains its own adapter and head.
HeadOnly: adapters are never sent, the task head is averaged (FedAvg). What a method gains over it is its adapter's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from fedray.adapters.adapter import Adapter
from fedray.adapters.kind import AdapterKind
from fedray.config import Head
from fedray.methods import adapters, heads
from fedray.methods.protocol import Averages, Broadcast, Initial, Local, Metrics, Uploaded
from fedray.types import Client, Vector, state_type


@state_type("local.Server", "fedray.methods.local.SharedHead")
@dataclass(frozen=True)
class SharedHead:
    """What is shared: the head, or nothing. Server state, downlink and uplink."""

    head: Vector | None


@state_type("local.Client", "fedray.methods.local.OwnAdapter")
@dataclass(frozen=True)
class OwnAdapter:
    """What a client keeps: its adapter, and its head unless that is shared or frozen."""

    adapter: Vector
    head: Vector | None


@dataclass(frozen=True)
class LocalOnly:
    """adapter: what the clients train. A shared head is private here: nothing is ever sent."""

    head: Head = "local"
    adapter: AdapterKind = adapters.LORA

    @property
    def effective_head(self) -> Head:
        return "local" if self.head == "shared" else self.head

    @property
    def averages(self) -> Averages:
        return "examples"

    def attach(self, model: nn.Module) -> Adapter:
        return adapters.attach(model, self.adapter, self.effective_head)

    def init_server(self, initial: Initial, clients: Sequence[Client]) -> SharedHead:
        return SharedHead(heads.initial(self.effective_head, initial.head())[0])

    def init_client(self, initial: Initial, client: Client) -> OwnAdapter:
        return OwnAdapter(initial.vectors[self.adapter.group], heads.initial(self.effective_head, initial.head())[1])

    def configure_train(self, server: SharedHead, cohort: Sequence[Client]) -> Broadcast[SharedHead]:
        return Broadcast(server, [client.id for client in cohort])

    def train_client(
        self, adapter: Adapter, client_state: OwnAdapter, downlink: SharedHead, local: Local
    ) -> tuple[SharedHead, OwnAdapter]:
        adapter.load(self.adapter.group, client_state.adapter)
        heads.load(self.effective_head, adapter, downlink.head, client_state.head)
        local.train()
        shared, own = heads.read(self.effective_head, adapter)
        return SharedHead(shared), OwnAdapter(adapter.read(self.adapter.group), own)

    def aggregate_train(
        self, server: SharedHead, updates: Sequence[Uploaded[SharedHead]]
    ) -> tuple[SharedHead, Metrics]:
        sent = [update.payload.head for update in updates]
        return SharedHead(heads.average(server.head, sent, [update.num_examples for update in updates])), {}


@dataclass(frozen=True)
class HeadOnly(LocalOnly):
    """adapter: what the clients train and keep. The head is shared whatever `head` says for the other methods."""

    @property
    def effective_head(self) -> Head:
        return "shared"

    def attach(self, model: nn.Module) -> Adapter:
        adapter = super().attach(model)
        heads.require_head("head_only", adapter)
        return adapter
