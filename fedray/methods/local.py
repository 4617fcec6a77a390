"""Local training without communication: every client trains an adapter and a head of its own.

This control shows what federation gains at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from fedray.adapters.adapter import Adapter
from fedray.adapters.kind import AdapterKind
from fedray.adapters.kinds.lora import LORA
from fedray.config import Head
from fedray.methods.parts import heads
from fedray.methods.protocol import Averages, Broadcast, Initial, Local, Metrics, Uploaded
from fedray.types import Client, Vector, state_type


@state_type("local.Server", "fedray.methods.local.SharedHead")
@dataclass(frozen=True)
class SharedHead:
    """What is shared: the head, or nothing. Server state, downlink and uplink."""

    head: Vector | None


@state_type("local.Client", "fedray.methods.local.OwnAdapter")
@dataclass(frozen=True)
class ClientState:
    """Client state: the adapter, and the head unless it is shared or frozen."""

    adapter: Vector
    head: Vector | None


@dataclass(frozen=True)
class LocalOnly:
    """Training without communication; a shared head is private here.

    Attributes:
        adapter: what the clients train.
    """

    head: Head = "local"
    adapter: AdapterKind = LORA

    @property
    def effective_head(self) -> Head:
        return "local" if self.head == "shared" else self.head

    @property
    def averages(self) -> Averages:
        return "examples"

    def attach(self, model: nn.Module) -> Adapter:
        return heads.attach(model, self.adapter, self.effective_head)

    def init_server(self, initial: Initial, clients: Sequence[Client]) -> SharedHead:
        return SharedHead(heads.initial(self.effective_head, initial.head())[0])

    def init_client(self, initial: Initial, client: Client) -> ClientState:
        return ClientState(initial.vectors[self.adapter.group], heads.initial(self.effective_head, initial.head())[1])

    def configure_train(self, server: SharedHead, cohort: Sequence[Client]) -> Broadcast[SharedHead]:
        return Broadcast(server, [client.id for client in cohort])

    def train_client(
        self, adapter: Adapter, client_state: ClientState, downlink: SharedHead, local: Local
    ) -> tuple[SharedHead, ClientState]:
        adapter.load(self.adapter.group, client_state.adapter)
        heads.load(self.effective_head, adapter, downlink.head, client_state.head)
        local.train()
        shared, own = heads.read(self.effective_head, adapter)
        return SharedHead(shared), ClientState(adapter.read(self.adapter.group), own)

    def aggregate_train(
        self, server: SharedHead, updates: Sequence[Uploaded[SharedHead]]
    ) -> tuple[SharedHead, Metrics]:
        sent = [update.payload.head for update in updates]
        return SharedHead(heads.average(server.head, sent, [update.num_examples for update in updates])), {}


ENTRY = LocalOnly
