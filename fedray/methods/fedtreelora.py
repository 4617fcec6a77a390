"""FedTreeLoRA (Bian et al., ICML 2026, arXiv 2603.13282): clients share shallow layers with many, deep ones with few.

`warmup_rounds` rounds of FedIT come first. At the end of the last one the server builds one tree of all clients that
have trained, by the mean over layers of the cosine distances of their updates, and cuts it anew for every layer l into
c_l clusters: the cut with the best silhouette of that layer's own distances, of those with c_l ≥ c_{l−1}. From then on

    y = W0 x + s · B A x + w · s · B_R A_R x

where (B, A) is the mean over client k's cluster of that layer, which k trains, (B_R, A_R) the frozen mean over all
clients outside of it, and w one trained number per target, which every client keeps. A cluster's mean is over its
members that took part; a cluster without any stays as it is. The head, if it is shared, is everybody's mean.

Where the paper was not at hand, chosen here: w starts at 0, so that the switch changes no model; in the others' mean
each client counts once, with its cluster's values; distances are of products B_k A_k (`fedray.aggregation.trees`);
a client that is not in the tree starts from the mean of all, and the tree is built again once it has trained.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from torch import nn

from fedray.adapters.adapter import Adapter
from fedray.adapters.layout import Layout
from fedray.adapters.lora import attach_lora
from fedray.config import Head, LoraSection
from fedray.errors import ConfigError
from fedray.methods.bases.shared_adapter import GlobalAdapter
from fedray.methods.parts import heads
from fedray.methods.parts.capacity import gather, own_layout, scatter
from fedray.methods.parts.factors import split
from fedray.methods.parts.layer_clusters import LayerClusters, clustered
from fedray.methods.protocol import Broadcast, Initial, Local, Metrics, Update, needs
from fedray.types import Client, ClientId, Vector, state_type


@state_type("fedtreelora.Server")
@dataclass(frozen=True)
class Server:
    """Server state: rounds in which clients trained; by client the layout of what it holds, the LoRA that it sent last
    and its number of examples; the clusters, without members during warm-up; the head, if it is shared."""

    rounds: int
    own: Mapping[ClientId, Layout]
    latest: Mapping[ClientId, Vector]
    counts: Mapping[ClientId, int]
    clusters: LayerClusters
    head: Vector | None


@dataclass(frozen=True)
class Branches(GlobalAdapter):
    """Downlink: the LoRA of the client's clusters, the head, and the others' LoRA; None during warm-up."""

    rest: Vector | None


@state_type("fedtreelora.Client")
@dataclass(frozen=True)
class ClientState:
    """Client state: w of every target, and the head if it is private."""

    weights: Vector
    head: Vector | None


@dataclass(frozen=True)
class FedTreeLora:
    """FedIT in clusters that are finer in deeper layers, beside a frozen LoRA of the other clients.

    Attributes:
        warmup_rounds: rounds of FedIT before the tree; `fedray plan` counts one of them, unless there is only one.
        clusters: c_l, by `silhouette`, or the same number in all layers: 1 is FedIT, one per client is FedALT with w.
        max_clusters: largest c_l that `silhouette` tries.
    """

    lora: LoraSection
    head: Head = "shared"
    warmup_rounds: int = 5
    clusters: int | Literal["silhouette"] = "silhouette"
    max_clusters: int = 8

    def __post_init__(self) -> None:
        for name in ("warmup_rounds", "clusters", "max_clusters"):
            if isinstance(value := getattr(self, name), int) and value < 1:
                raise ConfigError(f"fedtreelora.{name}: expected at least 1, got {value}")
        needs(self, "max_clusters", self.clusters == "silhouette", "clusters: silhouette")

    def attach(self, model: nn.Module) -> Adapter:
        adapter = attach_lora(model, self.lora, rest_rank=self.lora.rank, mixer="scalars")
        adapter.set_trainable(*heads.trainable(self.head, adapter, "lora", "mixer.w_R"))
        return adapter

    def init_server(self, initial: Initial, clients: Sequence[Client]) -> Server:
        first = LayerClusters.of(initial.layouts["lora"], initial.vectors["lora"])
        own = {client.id: own_layout(first.layout, client.capacity) for client in clients}
        return Server(0, own, {}, {}, first, heads.initial(self.head, initial.head())[0])

    def admit(self, server: Server, client: Client) -> Server:
        """Return the server with a client that arrives after the run."""
        return replace(server, own={**server.own, client.id: own_layout(server.clusters.layout, client.capacity)})

    def init_client(self, initial: Initial, client: Client) -> ClientState:
        weights = np.zeros(initial.layout("mixer.w_R").size, np.float32)
        return ClientState(weights, heads.initial(self.head, initial.head())[1])

    def configure_train(self, server: Server, cohort: Sequence[Client]) -> list[Broadcast[Branches]]:
        clusters, alike = server.clusters, dict[Any, list[ClientId]]()
        for client in cohort:
            alike.setdefault((clusters.labels.get(client.id), server.own[client.id]), []).append(client.id)
        sent = []
        for (labels, own), ids in alike.items():
            rest = gather(clusters.layout, own, clusters.rest(labels)) if clusters.labels else None
            lora = gather(clusters.layout, own, clusters.own(labels))
            sent.append(Broadcast(Branches(lora, server.head, rest), ids))
        return sent

    def train_client(
        self, adapter: Adapter, client_state: ClientState, downlink: Branches, local: Local
    ) -> tuple[GlobalAdapter, ClientState]:
        adapter.load("lora", downlink.adapter)
        nothing = np.zeros(adapter.layout("rest").size, np.float32)
        adapter.load("rest", nothing if downlink.rest is None else downlink.rest)
        adapter.load("mixer.w_R", client_state.weights)
        heads.load(self.head, adapter, downlink.head, client_state.head)
        local.train()
        head_up, head_own = heads.read(self.head, adapter)
        return GlobalAdapter(adapter.read("lora"), head_up), ClientState(adapter.read("mixer.w_R"), head_own)

    def aggregate_train(self, server: Server, updates: Sequence[Update[GlobalAdapter]]) -> tuple[Server, Metrics]:
        if not updates:
            return server, {}
        rounds, clusters = server.rounds + 1, server.clusters
        sent = {update.client.id: update.payload.adapter for update in updates}
        counts = {**server.counts, **{update.client.id: update.num_examples for update in updates}}
        latest = {**server.latest, **sent}
        if rounds >= self.warmup_rounds and latest.keys() != clusters.labels.keys():
            number = None if self.clusters == "silhouette" else self.clusters
            deltas = {id: split(server.own[id], vector) for id, vector in latest.items()}
            held = {id: scatter(clusters.layout, server.own[id], vector) for id, vector in latest.items()}
            clusters = clustered(clusters, deltas, number, self.max_clusters).moved(held, counts)
        moved = clusters.moved({id: scatter(clusters.layout, server.own[id], sent[id]) for id in sent}, counts)
        head = heads.average(server.head, [update.payload.head for update in updates], [counts[id] for id in sent])
        numbers = {"first_layer_clusters": len(moved.states[0]), "last_layer_clusters": len(moved.states[-1])}
        return Server(rounds, server.own, latest, counts, moved, head), numbers


ENTRY = FedTreeLora
