"""HetLoRA (Cho et al., EMNLP 2024, arXiv 2401.06432): ranks of the clients' own, which shrink where the last components
are idle, and weights by the norm of what a client learned.

Client k receives the first r_k components and trains with the penalty λ Σ ‖A[m:]‖ ‖B[:, m:]‖ over the targets, where
m = ⌊γ r_k⌋. If the tail's product of norms, summed over the targets, is then below the received one's,

    r_k ← max(m, r_min)    for good.

The server fills all factors up with zeros to the rank r and averages them, for each target with

    w_k ∝ ‖B_k A_k‖ = √tr((B_kᵀB_k)(A_kA_kᵀ)).

Departures: pruned components are zeroed and not cut, so that a payload keeps the shape of its tier, and the client
sends r_k along. Zeros shrink components that few clients hold. Of a component that nobody holds only B becomes zero,
because without its A it could never be trained again. `padding: held` averages over the holders only, and keeps what
nobody holds. Where all norms are 0, all clients count the same. The head is averaged by `weights`.

The paper's settings, from memory and a third party's notes: γ 0.99, which prunes one component at a time, λ 0.05 to
0.0005, ranks 5 to 50, PaLM 2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fedray.adapters.adapter import Adapter
from fedray.aggregation.low_rank import LowRank
from fedray.aggregation.products import component_sums, keep_alive, norm
from fedray.errors import ConfigError
from fedray.methods.bases.shared_adapter import ClientState as SharedClientState
from fedray.methods.bases.shared_adapter import GlobalAdapter, Server, SharedAdapter
from fedray.methods.parts import heads
from fedray.methods.parts.factors import Delta, by_target_padded, first_components, join, split
from fedray.methods.protocol import Initial, Local, Metrics, Update
from fedray.training.steering import Tail
from fedray.types import Client, state_type


@dataclass(frozen=True, kw_only=True)
class Pruned(GlobalAdapter):
    """Uplink: the adapter, and how many of its components are not pruned."""

    active_rank: int


@state_type("hetlora.Client")
@dataclass(frozen=True, kw_only=True)
class ClientState(SharedClientState):
    """Client state: r_k, and the head if it is private."""

    active_rank: int


@dataclass(frozen=True)
class HetLora(SharedAdapter):
    """LoRA of the tiers' ranks, with self-pruning and weights by norm.

    Attributes:
        weights: what a client counts for in the mean of the heads: `examples` (n_k) or `uniform`.
        gamma: γ in (0, 1], the share of the components before the tail; 1: no tail, so no penalty and no pruning.
        penalty: λ, 0.0005 to 0.05 in the paper; 0: pruning without a penalty.
        min_rank: r_min, below which no client prunes.
        padding: `zeros` for what a client does not hold (the paper), or the mean over those that do: `held`.
    """

    gamma: float = 0.99
    penalty: float = 0.005
    min_rank: int = 1
    padding: Literal["zeros", "held"] = "zeros"

    def __post_init__(self) -> None:
        self.requires_lora("whose components HetLoRA prunes")
        if not 0 < self.gamma <= 1:
            raise ConfigError(f"hetlora.gamma: expected a number above 0 and at most 1, got {self.gamma}")
        if not 0 <= self.penalty < math.inf:
            raise ConfigError(f"hetlora.penalty: expected a number of at least 0, got {self.penalty}")
        if self.min_rank < 1:
            raise ConfigError(f"hetlora.min_rank: expected at least 1, got {self.min_rank}")

    def init_client(self, initial: Initial, client: Client) -> ClientState:
        state = super().init_client(initial, client)
        return ClientState(head=state.head, active_rank=initial.layout("lora.A").slots[0].shape[0])

    def train_client(
        self, adapter: Adapter, client_state: SharedClientState, downlink: GlobalAdapter, local: Local
    ) -> tuple[Pruned, ClientState]:
        assert isinstance(client_state, ClientState)
        layout, active = adapter.layout("lora"), client_state.active_rank
        tail = math.floor(self.gamma * active + 1e-9)  # 0.29 · 100 is 28.999…
        start = first_components(split(layout, downlink.adapter), active)
        self.load(adapter, client_state, replace(downlink, adapter=join(start)), local)
        steers = tail < active and self.penalty > 0
        local.train(steering=Tail(tail, self.penalty) if steers else None, measure=False)
        trained = split(layout, adapter.read("lora"))
        if tail_norm(trained, tail) < tail_norm(start, tail):
            active = min(active, max(tail, self.min_rank))
        kept = join(first_components(trained, active))
        adapter.load("lora", kept)
        local.measure()
        local.record("active_rank", active)
        head_up, head_own = heads.read(self.effective_head, adapter)
        return Pruned(kept, head_up, active_rank=active), ClientState(head=head_own, active_rank=active)

    def aggregate_train(self, server: Server, updates: Sequence[Update[Pruned]]) -> tuple[Server, Metrics]:
        if not updates:
            return server, {}
        targets = by_target_padded(server.layout, [(update.capacity, update.payload.adapter) for update in updates])
        active = [update.payload.active_rank for update in updates]
        previous = split(server.layout, server.shared.adapter)
        adapter = join([self._mean(target, active, old) for target, old in zip(targets, previous, strict=True)])
        return replace(server, shared=GlobalAdapter(adapter, self.mean_head(server, updates))), {}

    def _mean(self, factors: Delta, active: Sequence[int], previous: LowRank) -> LowRank:
        """Return the server's next factors for one target.

        Args:
            factors: the clients', filled up with zeros.
            active: their r_k.
            previous: the server's factors.
        """
        weights = np.array([norm(x) for x in factors])
        rank = previous.rank
        held = np.arange(rank) < (np.array(active)[:, np.newaxis] if self.padding == "held" else rank)
        held = np.broadcast_to(held, (len(factors), rank))
        shares = held * weights[:, np.newaxis]
        shares = np.where(shares.any(axis=0), shares, held)  # all norms are 0
        total = shares.sum(axis=0)
        mean = component_sums(factors, shares / np.where(total > 0, total, 1))
        B, A = np.where(total > 0, mean.B, previous.B), np.where(total > 0, mean.A.T, previous.A.T).T
        return keep_alive(LowRank(B, A), previous)


def tail_norm(delta: Delta, tail: int) -> float:
    """Return Σ ‖A[tail:]‖ ‖B[:, tail:]‖ over the targets."""
    return float(sum(np.linalg.norm(x.A[tail:]) * np.linalg.norm(x.B[:, tail:]) for x in delta))


ENTRY = HetLora
