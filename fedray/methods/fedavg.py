"""FedAvg (McMahan et al., 2017) on LoRA (= FedIT, Zhang et al., 2023), on LoReFT (FedReFT's ablation baseline), or on
the whole model (full fine-tuning, the denominator of every ratio).

Every client of the cohort starts from the server's adapter, trains it, and sends it back; the server takes the mean,
weighted by num_examples. Averaged rotations of LoReFT are retracted to the Stiefel manifold (polar factor). Where tiers
hold parts of the adapter (`fedray.methods.parts.capacity`), a value is averaged over the clients that hold it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from fedray.adapters.adapter import Adapter
from fedray.adapters.kind import AdapterKind
from fedray.adapters.kinds.lora import LORA
from fedray.adapters.layout import Layout
from fedray.adapters.rotations import retract_rotations
from fedray.config import Head
from fedray.methods.parts import heads
from fedray.methods.parts.capacity import gather, held_mean, own_layout
from fedray.methods.protocol import Averages, Broadcast, Initial, Local, Metrics, Uploaded
from fedray.types import Client, ClientId, Vector, state_type


@state_type("fedavg.Shared", "fedray.methods.fedavg.Shared")
@dataclass(frozen=True)
class GlobalAdapter:
    """The adapter and, if it is shared, the head: downlink and uplink."""

    adapter: Vector
    head: Vector | None


@state_type("fedavg.Server", "fedray.methods.fedavg.Server")
@dataclass(frozen=True)
class Server:
    """Server state: the adapter and its layout."""

    layout: Layout
    shared: GlobalAdapter


@state_type("fedavg.Client", "fedray.methods.fedavg.OwnHead")
@dataclass(frozen=True)
class ClientState:
    """Client state: the head, if it is private."""

    head: Vector | None


@dataclass(frozen=True)
class FedAvg:
    """One adapter for all clients, the mean of theirs.

    Attributes:
        adapter: what is trained and averaged; `full` is the whole model.
        weights: `examples` (n_k, the paper) or `uniform`.
    """

    head: Head = "shared"
    adapter: AdapterKind = LORA
    weights: Averages = "examples"

    @property
    def averages(self) -> Averages:
        return self.weights

    def attach(self, model: nn.Module) -> Adapter:
        return heads.attach(model, self.adapter, self.head)

    def init_server(self, initial: Initial, clients: Sequence[Client]) -> Server:
        shared_head, _ = heads.initial(self.head, initial.head())
        return Server(
            initial.layouts[self.adapter.group], GlobalAdapter(initial.vectors[self.adapter.group], shared_head)
        )

    def init_client(self, initial: Initial, client: Client) -> ClientState:
        return ClientState(heads.initial(self.head, initial.head())[1])

    def configure_train(self, server: Server, cohort: Sequence[Client]) -> list[Broadcast[GlobalAdapter]]:
        holders: dict[Layout, list[ClientId]] = {}
        for client in cohort:
            holders.setdefault(own_layout(server.layout, client.capacity), []).append(client.id)
        return [
            Broadcast(replace(server.shared, adapter=gather(server.layout, own, server.shared.adapter)), ids)
            for own, ids in holders.items()
        ]

    def train_client(
        self, adapter: Adapter, client_state: ClientState, downlink: GlobalAdapter, local: Local
    ) -> tuple[GlobalAdapter, ClientState]:
        adapter.load(self.adapter.group, downlink.adapter)
        heads.load(self.head, adapter, downlink.head, client_state.head)
        local.train()
        shared, own = heads.read(self.head, adapter)
        return GlobalAdapter(adapter.read(self.adapter.group), shared), ClientState(own)

    def aggregate_train(self, server: Server, updates: Sequence[Uploaded[GlobalAdapter]]) -> tuple[Server, Metrics]:
        if not updates:
            return server, {}
        weights = [update.num_examples if self.weights == "examples" else update.num_clients for update in updates]
        held = [(own_layout(server.layout, update.capacity), update.payload.adapter) for update in updates]
        mean = held_mean(server.layout, server.shared.adapter, held, weights)
        head = heads.average(server.shared.head, [update.payload.head for update in updates], weights)
        return Server(server.layout, GlobalAdapter(retract_rotations(server.layout, mean), head)), {}


ENTRY = FedAvg
