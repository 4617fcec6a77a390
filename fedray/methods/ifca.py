"""IFCA (Ghosh et al., NeurIPS 2020, arXiv 2006.04088): J models; every client trains the one that fits it best.

A client receives all J models θ_j, and chooses, trains and sends one of them:

    j_k = argmin_j L_k(θ_j),    θ_j ← Σ_{k: j_k = j} w_k θ_k,   w_k = n_k / Σ_{k: j_k = j} n_k  or  1 / |{k: j_k = j}|

with L_k the loss over the client's training examples. A model that nobody chose stays as it is.

Departures: the paper's models differ from the start; here B = 0 makes all of them the same function, ties would put all
clients into cluster 0, and the clusters would never part. So clients are assigned at random in round 0, equally many to
each cluster, models have an A of their own each, and a later tie keeps the client's cluster. A shared head belongs to
its model; a private one is the client's, and is judged together with each model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from fedray.adapters.adapter import Adapter
from fedray.adapters.draws import draw_lora
from fedray.adapters.layout import Layout
from fedray.adapters.lora import attach_lora
from fedray.config import Head, LoraSection
from fedray.errors import ConfigError
from fedray.methods.bases.shared_adapter import GlobalAdapter
from fedray.methods.parts import heads
from fedray.methods.parts.capacity import by_layout, gather, held_mean, own_layout, places
from fedray.methods.protocol import Averages, Broadcast, Initial, Local, Metrics, Update
from fedray.randomness import keyed_rng
from fedray.types import Client, Vector, state_type


@state_type("ifca.Server")
@dataclass(frozen=True)
class Server:
    """Server state: every cluster's model, and the layout of their adapters."""

    layout: Layout
    models: tuple[GlobalAdapter, ...]


@dataclass(frozen=True)
class Models:
    """Downlink: every cluster's model."""

    models: tuple[GlobalAdapter, ...]


@dataclass(frozen=True)
class Chosen:
    """Uplink: the trained model, and which it is."""

    model: GlobalAdapter
    cluster: int


@state_type("ifca.Client")
@dataclass(frozen=True)
class Member:
    """Client state: the head, if it is private, and the client's last cluster."""

    head: Vector | None
    cluster: int


@dataclass(frozen=True)
class Ifca:
    """One model per cluster of clients, and every client chooses its cluster anew in each round.

    Attributes:
        clusters: J; 1 is FedAvg.
        weights: what a client counts for in its cluster: `examples` (n_k) or `uniform`.
    """

    personalised: ClassVar[bool] = True

    lora: LoraSection
    head: Head = "shared"
    clusters: int = 2
    weights: Averages = "examples"

    def __post_init__(self) -> None:
        if self.clusters < 1:
            raise ConfigError(f"ifca.clusters: expected at least 1, got {self.clusters}")

    def attach(self, model: nn.Module) -> Adapter:
        adapter = attach_lora(model, self.lora)
        adapter.set_trainable(*heads.trainable(self.head, adapter, "lora"))
        return adapter

    def init_server(self, initial: Initial, clients: Sequence[Client]) -> Server:
        layout, head = initial.layouts["lora"], heads.initial(self.head, initial.head())[0]
        others = [draw_lora(layout, initial.seed, "ifca", j) for j in range(1, self.clusters)]
        return Server(layout, tuple(GlobalAdapter(lora, head) for lora in (initial.vectors["lora"], *others)))

    def init_client(self, initial: Initial, client: Client) -> Member:
        """Assign the client at random: J neighbours in the order of ids are in different clusters."""
        block, place = divmod(client.index, self.clusters)
        clusters = keyed_rng(initial.seed, "ifca", block).permutation(self.clusters)
        return Member(heads.initial(self.head, initial.head())[1], int(clusters[place]))

    def configure_train(self, server: Server, cohort: Sequence[Client]) -> list[Broadcast[Models]]:
        common = server.layout

        def held(own: Layout) -> Models:
            return Models(tuple(replace(m, adapter=gather(common, own, m.adapter)) for m in server.models))

        return [Broadcast(held(own), ids) for own, ids in by_layout(common, cohort).items()]

    def train_client(
        self, adapter: Adapter, client_state: Member, downlink: Models, local: Local
    ) -> tuple[Chosen, Member]:
        cluster = client_state.cluster
        if local.server_round > 0:
            losses = []
            for model in downlink.models:
                self._load(model, adapter, client_state)
                losses.append(local.evaluate("train").loss)
            if min(losses) < losses[cluster]:
                cluster = losses.index(min(losses))
        self._load(downlink.models[cluster], adapter, client_state)
        local.train()
        local.record("cluster", cluster)
        shared, own = heads.read(self.head, adapter)
        return Chosen(GlobalAdapter(adapter.read("lora"), shared), cluster), Member(own, cluster)

    def _load(self, model: GlobalAdapter, adapter: Adapter, client_state: Member) -> None:
        adapter.load("lora", model.adapter)
        heads.load(self.head, adapter, model.head, client_state.head)

    def aggregate_train(self, server: Server, updates: Sequence[Update[Chosen]]) -> tuple[Server, Metrics]:
        members = [[u for u in updates if u.payload.cluster == j] for j in range(self.clusters)]
        models = [self._mean(server, model, mine) for model, mine in zip(server.models, members, strict=True)]
        sizes = {f"cluster_{j}_size": float(len(mine)) for j, mine in enumerate(members)}
        return replace(server, models=tuple(models)), sizes

    def _mean(self, server: Server, model: GlobalAdapter, updates: Sequence[Update[Chosen]]) -> GlobalAdapter:
        """Return a cluster's next model: the mean of those that its members trained."""
        counts = [u.num_examples if self.weights == "examples" else 1 for u in updates]
        where = [places(server.layout, own_layout(server.layout, u.capacity)) for u in updates]
        sent = [u.payload.model for u in updates]
        adapter = held_mean(model.adapter, [(w, s.adapter) for w, s in zip(where, sent, strict=True)], counts)
        return GlobalAdapter(adapter, heads.average(model.head, [s.head for s in sent], counts))


ENTRY = Ifca
