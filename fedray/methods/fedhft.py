"""FedHFT: masked adapters at the inner level, clusters of clients at the outer level (arXiv 2510.14054).

Inner level: client k sees W0 + Σ_j π_kj ΔW_j as its frozen weight and trains a fresh LoRA (B = 0) on top. Its
capacity ratio ρ_k keeps the ⌈ρ_k d_out⌉ most important output rows of each target's B; only those travel. Per cluster
j and row i

    ΔU_j[i,:] = Σ_k π_kj m_k[i] (B_k A_k)[i,:] / Σ_k π_kj m_k[i]        ΔW_j ← ΔW_j + ΔU_j

Outer level: after `warmup_rounds` the driver refits a Gaussian mixture on the clients' latest updates at the end of
each round, and sets π_k to client k's posterior.

Choices where the paper is open: A of the fresh LoRA is one draw for all clients and rounds, so that the sum over rounds
stays close to one row space and the downlink's truncation loses little; the Fisher importance of an output is the mean
squared gradient over the local examples; under `pre` the importance is the energy of what the client can know before
training (its downlink and its previous update); J by BIC is kept from the first refit that finds more than one group;
posteriors under 1e-6 count as zero. The downlink is truncated to `downlink_rank` for every client, by default to the
rank of its own LoRA, which its tier may make smaller.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
from torch import nn

from fedray.adapters.adapter import Adapter
from fedray.adapters.draws import draw_lora
from fedray.adapters.layout import Layout
from fedray.adapters.lora import attach_lora
from fedray.adapters.rows import hold_rows
from fedray.aggregation.low_rank import (
    MIN_MEMBERSHIP,
    cluster_update,
    compress,
    concatenate,
    truncate,
)
from fedray.aggregation.masks import Mask, energy, random_rows, top_rows
from fedray.aggregation.means import weighted_mean
from fedray.config import Head, LoraSection
from fedray.errors import ConfigError
from fedray.methods.parts import heads, soft_clusters
from fedray.methods.parts.capacity import own_layout
from fedray.methods.parts.carried import cut, grow
from fedray.methods.parts.factors import Delta, join, keep_rows, pack_masks, receive, split, unpack_masks, zero
from fedray.methods.parts.masking import important_rows, mask_ratio
from fedray.methods.parts.wire import Wire, WireType, decode, encode
from fedray.methods.protocol import Broadcast, Initial, Local, Metrics, Update, needs
from fedray.randomness import keyed_seed
from fedray.types import Client, ClientId, Vector, state_type


@state_type("fedhft.Server", "fedray.methods.fedhft.Server")
@dataclass(frozen=True)
class Server:
    """Server state.

    Attributes:
        deltas: ΔW_j per cluster.
        heads: one per cluster; none where the head is not shared.
        memberships: π_k of every client, [J].
        features: every client's latest update, by which it is clustered: its head [d], or B_k A_k.
    """

    seed: int
    layout: Layout
    server_round: int
    deltas: tuple[Delta, ...]
    heads: tuple[Vector, ...]
    memberships: Mapping[ClientId, Vector]
    features: Mapping[ClientId, Vector | Delta]


@dataclass(frozen=True)
class ClusterMixture:
    """Downlink: the clusters' states, weighted by the client's memberships.

    Attributes:
        rest: Σ_j π_kj ΔW_j as factors of rank downlink_rank; None in round 0, where it is zero.
        head: Σ_j π_kj head_j.
        memberships: π_k, [J].
    """

    rest: Wire | None
    head: Wire | None
    memberships: Vector


@dataclass(frozen=True)
class MaskedUpdate:
    """Uplink.

    Attributes:
        factors: per target A_k, then the kept rows of B_k.
        masks: per target which rows those are, as a bitset; None where all are kept.
        head: the head, if it is shared.
    """

    factors: Wire
    masks: npt.NDArray[np.uint8] | None
    head: Wire | None


@state_type("fedhft.Client", "fedray.methods.fedhft.Own")
@dataclass(frozen=True)
class ClientState:
    """Client state.

    Attributes:
        previous: the factors of its last update, only where timing `pre` needs them.
        head: the head, if it is private.
    """

    previous: Vector | None
    head: Vector | None


@dataclass(frozen=True)
class FedHft(soft_clusters.AdmitsClients):
    """Masked LoRAs within soft clusters.

    Attributes:
        clusters: J, or `auto` (by BIC).
        max_clusters: the most clusters that `auto` chooses.
        warmup_rounds: rounds before the first refit; 5 means that it ends the sixth round.
        timing: `post` masks after unmasked training, `pre` trains only the kept rows.
        importance: `fisher` (default) or `energy`; under `pre` always `energy`.
        normalise: by memberships (the paper) or by `count` (the released code; shrinks what a client sees to 1/J).
        server_state: `full` grows ΔW_j losslessly, `rank_q` truncates it each round; rounds.parquet then has the
            largest relative error of a round's truncation.
        server_rank: rank of `rank_q`; default the LoRA's.
        downlink_rank: default the rank of the client's own LoRA.
        features: what is clustered; default the head where it is shared, else B_k A_k.
        wire: type of the numbers that travel.
        n_init: restarts of the mixture's fit.
    """

    personalised: ClassVar[bool] = True

    lora: LoraSection
    head: Head = "shared"
    clusters: int | Literal["auto"] = 2
    max_clusters: int = 8
    warmup_rounds: int = 5
    timing: Literal["post", "pre"] = "post"
    importance: Literal["fisher", "energy"] | None = None
    normalise: Literal["membership", "count"] = "membership"
    server_state: Literal["full", "rank_q"] = "full"
    server_rank: int | None = None
    downlink_rank: int | None = None
    features: Literal["head", "lora"] | None = None
    wire: WireType = "float32"
    n_init: int = 5

    def __post_init__(self) -> None:
        if isinstance(self.clusters, int) and self.clusters < 1:
            raise ConfigError(f"fedhft.clusters: expected `auto` or at least 1, got {self.clusters}")
        if self.timing == "pre" and self.importance == "fisher":
            raise ConfigError(
                "fedhft.importance: `fisher` needs a trained adapter and cannot choose rows before training; "
                "use `energy` with timing `pre`, or timing `post`"
            )
        if self.features == "head" and self.head != "shared":
            raise ConfigError(f"fedhft.features: `head` needs head: shared, got head: {self.head}; use features: lora")
        for name in ("server_rank", "downlink_rank", "max_clusters", "n_init"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"fedhft.{name}: expected at least 1, got {value}")
        if self.warmup_rounds < 0:
            raise ConfigError(f"fedhft.warmup_rounds: expected at least 0, got {self.warmup_rounds}")
        needs(self, "server_rank", self.server_state == "rank_q", "server_state: rank_q")
        needs(self, "max_clusters", self.clusters == "auto", "clusters: auto")

    def attach(self, model: nn.Module) -> Adapter:
        rank = self.downlink_rank or self.lora.rank
        adapter = attach_lora(model, self.lora, rest_rank=rank, rest_dropout=False, mixer=None)
        if self.features == "head":
            heads.require_head("fedhft with features: head", adapter)
        adapter.fit_capacity = hold_rows if self.timing == "pre" else None
        adapter.set_trainable(*heads.trainable(self.head, adapter, "lora"))
        return adapter

    def init_server(self, initial: Initial, clients: Sequence[Client]) -> Server:
        clusters = 1 if self.clusters == "auto" else self.clusters
        layout = initial.layouts["lora"]
        head, _ = heads.initial(self.head, initial.head())
        uniform = np.full(clusters, 1 / clusters, np.float32)
        return Server(
            seed=initial.seed,
            layout=layout,
            server_round=0,
            deltas=(zero(layout),) * clusters,
            heads=() if head is None else (head,) * clusters,
            memberships={client.id: uniform for client in clients},
            features={},
        )

    def init_client(self, initial: Initial, client: Client) -> ClientState:
        return ClientState(None, heads.initial(self.head, initial.head())[1])

    def configure_train(self, server: Server, cohort: Sequence[Client]) -> list[Broadcast[ClusterMixture]]:
        alike: dict[tuple[bytes, int], list[ClientId]] = {}
        for client in cohort:
            rank = self.downlink_rank or client.capacity.get("lora_rank", self.lora.rank)
            alike.setdefault((server.memberships[client.id].tobytes(), rank), []).append(client.id)
        return [
            Broadcast(self._mixture(server, server.memberships[ids[0]], rank), ids) for (_, rank), ids in alike.items()
        ]

    def _mixture(self, server: Server, pi: Vector, rank: int) -> ClusterMixture:
        rest = None
        if server.server_round:
            mixed = [
                truncate(concatenate([(float(p), delta) for p, delta in zip(pi, target, strict=True) if p > 0]), rank)
                for target in zip(*server.deltas, strict=True)
            ]
            rest = encode(join(mixed), self.wire)
        head = None
        if server.heads:
            head = encode(np.einsum("j,jd->d", pi, np.stack(server.heads)).astype(np.float32), self.wire)
        return ClusterMixture(rest, head, pi)

    def train_client(
        self, adapter: Adapter, client_state: ClientState, downlink: ClusterMixture, local: Local
    ) -> tuple[MaskedUpdate, ClientState]:
        layout, rest_layout = adapter.whole_layout("lora"), adapter.layout("rest")
        rest = np.zeros(rest_layout.size, np.float32) if downlink.rest is None else decode(downlink.rest)
        fresh = draw_lora(layout, local.seed)
        masks: tuple[Mask, ...]
        if self.timing == "pre":
            previous = () if client_state.previous is None else split(layout, client_state.previous)
            masks = self._masks_before(tuple(adapter.targets), split(rest_layout, rest), previous, local)
            adapter.set_rows(
                {module: np.flatnonzero(mask) for module, mask in zip(adapter.targets, masks, strict=True)}
            )
            fresh = join(keep_rows(split(layout, fresh), masks))
        adapter.load("rest", rest)
        adapter.load("lora", fresh)
        heads.load(self.head, adapter, None if downlink.head is None else decode(downlink.head), client_state.head)

        local.train()

        kept = adapter.read("lora")
        if self.timing == "post":
            trained = split(layout, kept)
            masks = important_rows(adapter.targets, trained, self.importance or "fisher", local)
            kept = join(keep_rows(trained, masks))
        local.record("mask_size", int(sum(mask.sum() for mask in masks)))
        local.record("clusters", downlink.memberships.tolist())
        head_up, head_own = heads.read(self.head, adapter)
        uplink = MaskedUpdate(
            encode(kept, self.wire), pack_masks(masks), None if head_up is None else encode(head_up, self.wire)
        )
        return uplink, ClientState(join(receive(layout, kept, masks)) if self.timing == "pre" else None, head_own)

    def _masks_before(
        self, targets: tuple[str, ...], downlink: Delta, previous: Delta, local: Local
    ) -> tuple[Mask, ...]:
        """Return the rows in which downlink and previous update have most energy, or random rows while both are zero
        (timing `pre`)."""
        masks = []
        for index, module in enumerate(targets):
            known = concatenate([(1.0, delta[index]) for delta in (downlink, previous) if delta])
            importance = energy(known.B, known.A)
            if importance.any():
                masks.append(top_rows(importance, mask_ratio(local.client)))
            else:
                masks.append(random_rows(importance.size, mask_ratio(local.client), local.rng(f"rows {module}")))
        return tuple(masks)

    def aggregate_train(self, server: Server, updates: Sequence[Update[MaskedUpdate]]) -> tuple[Server, Metrics]:
        server = replace(server, server_round=server.server_round + 1)
        if not updates:
            return server, {}
        ids = [update.client.id for update in updates]
        masks = [unpack_masks(server.layout, update.payload.masks) for update in updates]
        factors = [
            receive(own_layout(server.layout, update.capacity), decode(update.payload.factors), mask)
            for update, mask in zip(updates, masks, strict=True)
        ]
        sent = [decode(update.payload.head) for update in updates if update.payload.head is not None]
        pi = np.stack([server.memberships[id] for id in ids])
        latest = sent if server.heads and self.features != "lora" else factors
        grown = [self._grow(delta, factors, pi[:, j], masks) for j, delta in enumerate(server.deltas)]
        server = replace(
            server,
            deltas=tuple(delta for delta, _ in grown),
            heads=tuple(
                head if pi[:, j].sum() < MIN_MEMBERSHIP else weighted_mean(np.stack(sent), pi[:, j])
                for j, head in enumerate(server.heads)
            ),
            features={**server.features, **dict(zip(ids, latest, strict=True))},
        )
        if server.server_round > self.warmup_rounds:
            server = self._recluster(server)
        metrics = soft_clusters.sizes(server.memberships)
        if self.server_state == "rank_q":
            metrics["truncation_error"] = max(error for _, error in grown)
        return server, metrics

    def _grow(
        self, delta: Delta, factors: Sequence[Delta], pi: Vector, masks: Sequence[tuple[Mask, ...]]
    ) -> tuple[Delta, float]:
        """Return ΔW_j + ΔU_j per target, lossless or truncated as `server_state` says, and the largest relative error
        of a truncation.

        Args:
            pi: the cohort's memberships in this cluster, [cohort].
        """
        updates = [
            cluster_update([factor[target] for factor in factors], pi, [mask[target] for mask in masks], self.normalise)
            for target in range(len(delta))
        ]
        if self.server_state == "full":
            return grow(delta, updates, lambda x: (compress(x), 0.0))
        rank = self.server_rank or self.lora.rank
        return grow(delta, updates, lambda x: cut(x, rank))

    def _recluster(self, server: Server) -> Server:
        """Refit the mixture on the latest updates (the outer level); one cluster may split into copies of itself."""
        choose = self.max_clusters if self.clusters == "auto" and len(server.deltas) == 1 else None
        seed = keyed_seed(server.seed, "mixture", server.server_round)
        memberships = soft_clusters.refit(server.memberships, server.features, seed, self.n_init, choose)
        copies = len(next(iter(memberships.values()))) // len(server.deltas)
        return replace(server, memberships=memberships, deltas=server.deltas * copies, heads=server.heads * copies)


ENTRY = FedHft
