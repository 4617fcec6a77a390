"""FedLEASE (Wang et al., NeurIPS 2025, arXiv 2509.15087): one LoRA expert per cluster of clients, and a router.

For `warmup_rounds` rounds every client trains a LoRA of its own. Then the server clusters the clients by the cosines of
their updates (mean over targets, average linkage, the number M of clusters with the best silhouette); expert j is the
mean over cluster j. From then on a client of cluster j computes

    y = W0 x + s · Σ_i ω_i(x) B_i A_i x,

with ω the top M of 2M − 1 choices among the M experts and M − 1 further copies of its own (`fedray.adapters.mixers.
Router`), trains expert j and its router, and sends both; the server takes their unweighted means over the cluster.

Chosen here: distances are those of the products B_k A_k instead of raw B (`fedray.aggregation.trees`); M may be 1; a
client that was not clustered trains its own LoRA first and then joins the expert with the nearest product; the
clusters, once found, stay. The official code renames parameters by replacing every 0 in a name, which also hits layers.

Settings of the official code: RoBERTa-large, rank 4, lr 3e-3, 2 epochs, batch 128, 25 rounds of which 5 are warm-up,
at most 4 experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from fedray.adapters.adapter import Adapter
from fedray.adapters.layout import Layout
from fedray.adapters.lora import attach_lora
from fedray.config import Head, LoraSection
from fedray.errors import ConfigError
from fedray.methods.parts import heads
from fedray.methods.parts.capacity import gather, own_layout
from fedray.methods.parts.expert_pool import ExpertPool, Trained, load_experts
from fedray.methods.protocol import Broadcast, Initial, Local, Metrics, Update
from fedray.types import Client, ClientId, Vector, state_type


@state_type("fedlease.Server")
@dataclass(frozen=True)
class Server:
    """Server state: rounds in which clients trained, the clusters, and the head, if it is shared."""

    rounds: int
    pool: ExpertPool
    head: Vector | None


@dataclass(frozen=True)
class Experts:
    """Downlink: the head and, for a client in a cluster, its expert, the other ones, and its router."""

    head: Vector | None
    own: Vector | None = None
    others: tuple[Vector, ...] = ()
    router: Vector | None = None


@dataclass(frozen=True)
class Expert:
    """Uplink: the client's LoRA, its router, of zeros where it trains alone, and the head."""

    lora: Vector
    router: Vector
    head: Vector | None


@state_type("fedlease.Client")
@dataclass(frozen=True)
class ClientState:
    """Client state: the LoRA of a client that is in no cluster yet, and the head if it is private."""

    lora: Vector | None
    head: Vector | None


@dataclass(frozen=True)
class FedLease:
    """A trained expert per cluster, and a router.

    Attributes:
        warmup_rounds: rounds in which the clients train alone; `fedray plan` counts one, unless there is only one.
        max_experts: largest M, for which the adapter has room.
    """

    lora: LoraSection
    head: Head = "shared"
    warmup_rounds: int = 5
    max_experts: int = 4

    def __post_init__(self) -> None:
        for name, least in (("warmup_rounds", 1), ("max_experts", 2)):
            if getattr(self, name) < least:
                raise ConfigError(f"fedlease.{name}: expected at least {least}, got {getattr(self, name)}")

    def attach(self, model: nn.Module) -> Adapter:
        rank = (self.max_experts - 1) * self.lora.rank
        adapter = attach_lora(model, self.lora, rest_rank=rank, mixer="experts")
        adapter.set_trainable(*heads.trainable(self.head, adapter, "lora", "mixer.G"))
        return adapter

    def init_server(self, initial: Initial, clients: Sequence[Client]) -> Server:
        pool = ExpertPool(initial.layouts["lora"], initial.vectors["lora"], initial.vector("mixer.G"), {}, {}, (), ())
        return Server(0, pool, heads.initial(self.head, initial.head())[0])

    def init_client(self, initial: Initial, client: Client) -> ClientState:
        return ClientState(initial.vectors["lora"], heads.initial(self.head, initial.head())[1])

    def configure_train(self, server: Server, cohort: Sequence[Client]) -> list[Broadcast[Experts]]:
        pool, alike = server.pool, dict[tuple[int | None, Layout], list[ClientId]]()
        for client in cohort:
            kind = pool.labels.get(client.id), own_layout(pool.layout, client.capacity)
            alike.setdefault(kind, []).append(client.id)
        sent = []
        for (label, own), ids in alike.items():
            down = Experts(server.head)
            if label is not None:
                held = [gather(pool.layout, own, expert) for expert in pool.experts]
                down = Experts(server.head, held.pop(label), tuple(held), pool.routers[label])
            sent.append(Broadcast(down, ids))
        return sent

    def train_client(
        self, adapter: Adapter, client_state: ClientState, downlink: Experts, local: Local
    ) -> tuple[Expert, ClientState]:
        own = client_state.lora if downlink.own is None else downlink.own
        router = np.zeros(adapter.layout("mixer.G").size, np.float32) if downlink.router is None else downlink.router
        assert own is not None
        load_experts(adapter, own, downlink.others, router)
        heads.load(self.head, adapter, downlink.head, client_state.head)
        local.train()
        lora, (head_up, head_own) = adapter.read("lora"), heads.read(self.head, adapter)
        kept = lora if downlink.own is None else None
        return Expert(lora, adapter.read("mixer.G"), head_up), ClientState(kept, head_own)

    def aggregate_train(self, server: Server, updates: Sequence[Update[Expert]]) -> tuple[Server, Metrics]:
        if not updates:
            return server, {}
        pool, rounds, trained = server.pool, server.rounds + 1, {}
        for update in updates:
            own = own_layout(pool.layout, update.capacity)
            trained[update.client.id] = Trained(own, update.payload.lora, update.payload.router)
        pool = pool.with_alone(trained)
        if pool.experts or rounds >= self.warmup_rounds:
            pool = pool.moved(trained) if pool.experts else pool.clustered(self.max_experts)
        came = [update.payload.head for update in updates]
        head = heads.average(server.head, came, [update.num_examples for update in updates])
        return Server(rounds, pool, head), {"experts": len(pool.experts)}


ENTRY = FedLease
