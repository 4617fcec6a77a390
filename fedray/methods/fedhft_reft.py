"""FedHFT's clusters (arXiv 2510.14054) over LoReFT interventions (FedReFT's, arXiv 2508.20295) instead of LoRAs.

Client k belongs to cluster j by the share π_kj. It starts from the mixture of the clusters' interventions, trains it,
and sends it; each cluster takes the mean of what came, weighted by the shares:

    φ_k ← Σ_j π_kj φ_j       φ_j ← Σ_k π_kj φ_k / Σ_k π_kj       (rotations are retracted to the Stiefel manifold)

After `warmup_rounds` a Gaussian mixture is refitted to the clients' latest updates at the end of each round, and π_k
becomes client k's posterior.

No paper has this crossing. FedHFT adds a round's products to what a cluster has; interventions have no such sum, so
their mean takes its place. LoReFT has no rows of B to mask: every client sends all it holds. A value's mean is over
the clients whose tier edits its layer, and it stays where their shares sum to less than 1e-3, as FedHFT's rows do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field
from torch import nn

from fedray.adapters.adapter import Adapter
from fedray.adapters.layout import Layout
from fedray.adapters.reft import attach_reft
from fedray.adapters.rotations import retract_rotations
from fedray.aggregation.low_rank import MIN_MEMBERSHIP
from fedray.config import Head, ReftSection
from fedray.errors import ConfigError
from fedray.methods.bases.shared_adapter import ClientState, GlobalAdapter
from fedray.methods.parts import heads, soft_clusters
from fedray.methods.parts.capacity import gather, held_mean, own_layout, places, scatter
from fedray.methods.protocol import Broadcast, Initial, Local, Metrics, Update, needs
from fedray.randomness import keyed_seed
from fedray.types import Client, ClientId, Vector, state_type


@state_type("fedhft_reft.Server")
@dataclass(frozen=True)
class Server:
    """Server state: rounds with updates; φ_j and heads; every client's π_k [J] and latest φ_k or head."""

    seed: int
    layout: Layout
    rounds: int
    clusters: tuple[GlobalAdapter, ...]
    memberships: Mapping[ClientId, Vector]
    features: Mapping[ClientId, Vector]


@dataclass(frozen=True)
class FedHftReft(soft_clusters.AdmitsClients):
    """LoReFT interventions within soft clusters.

    Attributes:
        clusters, max_clusters: J, or `auto`, which chooses it by BIC, at most max_clusters.
        warmup_rounds: rounds before the first refit.
        features: what is clustered; default the head where it is shared, else φ_k.
    """

    personalised: ClassVar[bool] = True

    reft: ReftSection
    head: Head = "shared"
    clusters: int | Literal["auto"] = 2
    max_clusters: int = 8
    warmup_rounds: Annotated[int, Field(ge=0)] = 5
    features: Literal["head", "reft"] | None = None

    def __post_init__(self) -> None:
        for name in ("clusters", "max_clusters"):
            if isinstance(value := getattr(self, name), int) and value < 1:
                raise ConfigError(f"fedhft_reft.{name}: expected at least 1, got {value}")
        if self.features == "head" and self.head != "shared":
            raise ConfigError(f"fedhft_reft.features: `head` needs head: shared, got {self.head}; use features: reft")
        needs(self, "max_clusters", self.clusters == "auto", "clusters: auto")

    def attach(self, model: nn.Module) -> Adapter:
        adapter = attach_reft(model, self.reft)
        if self.features == "head":
            heads.require_head("fedhft_reft with features: head", adapter)
        adapter.set_trainable(*heads.trainable(self.head, adapter, "reft"))
        return adapter

    def init_server(self, initial: Initial, clients: Sequence[Client]) -> Server:
        number = 1 if self.clusters == "auto" else self.clusters
        first = GlobalAdapter(initial.vectors["reft"], heads.initial(self.head, initial.head())[0])
        pi = dict.fromkeys((client.id for client in clients), np.full(number, 1 / number, np.float32))
        return Server(initial.seed, initial.layouts["reft"], 0, (first,) * number, pi, {})

    def init_client(self, initial: Initial, client: Client) -> ClientState:
        return ClientState(heads.initial(self.head, initial.head())[1])

    def configure_train(self, server: Server, cohort: Sequence[Client]) -> list[Broadcast[GlobalAdapter]]:
        alike: dict[tuple[bytes, Layout], list[ClientId]] = {}
        for client in cohort:
            own = own_layout(server.layout, client.capacity)
            alike.setdefault((server.memberships[client.id].tobytes(), own), []).append(client.id)
        return [Broadcast(self._mixture(server, own, ids[0]), ids) for (_, own), ids in alike.items()]

    def _mixture(self, server: Server, own: Layout, id: ClientId) -> GlobalAdapter:
        first, *rest = server.clusters
        pi = server.memberships[id].astype(np.float64)
        mixed = first.combine(lambda *values: np.einsum("j,jd->d", pi, np.stack(values)).astype(np.float32), *rest)
        return replace(mixed, adapter=gather(server.layout, own, retract_rotations(server.layout, mixed.adapter)))

    def train_client(
        self, adapter: Adapter, client_state: ClientState, downlink: GlobalAdapter, local: Local
    ) -> tuple[GlobalAdapter, ClientState]:
        adapter.load("reft", downlink.adapter)
        heads.load(self.head, adapter, downlink.head, client_state.head)
        local.train()
        head_up, head_own = heads.read(self.head, adapter)
        return GlobalAdapter(adapter.read("reft"), head_up), ClientState(head_own)

    def aggregate_train(self, server: Server, updates: Sequence[Update[GlobalAdapter]]) -> tuple[Server, Metrics]:
        if not updates:
            return server, {}
        clusters = tuple(self._moved(server, j, updates) for j in range(len(server.clusters)))
        features = {**server.features, **{update.client.id: self._feature(server, update) for update in updates}}
        server = replace(server, rounds=server.rounds + 1, clusters=clusters, features=features)
        if server.rounds > self.warmup_rounds:
            choose = self.max_clusters if self.clusters == "auto" and len(server.clusters) == 1 else None
            seed = keyed_seed(server.seed, "mixture", server.rounds)
            pi = soft_clusters.refit(server.memberships, server.features, seed, choose=choose)
            copies = len(next(iter(pi.values()))) // len(server.clusters)  # one cluster may split
            server = replace(server, memberships=pi, clusters=server.clusters * copies)
        return server, soft_clusters.sizes(server.memberships)

    def _feature(self, server: Server, update: Update[GlobalAdapter]) -> Vector:
        """Return what the client is clustered by; layers that it does not edit are as it received them."""
        if update.payload.head is not None and self.features != "reft":
            return update.payload.head
        held = scatter(server.layout, own_layout(server.layout, update.capacity), update.payload.adapter)
        return np.where(np.isnan(held), self._mixture(server, server.layout, update.client.id).adapter, held)

    def _moved(self, server: Server, j: int, updates: Sequence[Update[GlobalAdapter]]) -> GlobalAdapter:
        """Return cluster j after a round: as it was where no client belongs to it."""
        pi, old = [float(server.memberships[update.client.id][j]) for update in updates], server.clusters[j]
        if sum(pi) < MIN_MEMBERSHIP:
            return old
        where = [places(server.layout, own_layout(server.layout, update.capacity)) for update in updates]
        sent = [(place, update.payload.adapter) for place, update in zip(where, updates, strict=True)]
        mean = held_mean(old.adapter, sent, pi, MIN_MEMBERSHIP)
        head = heads.average(old.head, [update.payload.head for update in updates], pi)
        return GlobalAdapter(retract_rotations(server.layout, mean), head)


ENTRY = FedHftReft
