"""FLoRA (Wang et al., NeurIPS 2024, arXiv 2409.05976): the clients' LoRAs are stacked, which adds up their products
exactly, and every round starts anew on top of the sum.

Client k draws A_k, sets B_k = 0, and trains both on top of C. The server adds the products, whatever their ranks:

    C ← C + Σ_k w_k B_k A_k = C + [w_1 B_1 … w_K B_K] [A_1; …; A_K]

in Σ_k r_k columns. The weights go into one of the factors only.

Departures: the paper merges the sum into the base weights; here nothing is merged, and C is carried in a frozen second
branch, so that it is sent whole to everybody. A_k is keyed by (seed, round, client). As B_k = 0 at the start of every
round, A_k's first gradient is zero: with few local steps A hardly learns.

The paper's settings, after its code: rank 16, alpha 32 on q_proj and v_proj, lr 3e-4, 10 clients, 1 to 3 epochs and
rounds; with unequal ranks 64, 32, 16, 16, 8, 8, 4, 4, 4 and 4, alpha is twice the rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedray.adapters.adapter import Adapter
from fedray.adapters.draws import draw_lora
from fedray.aggregation.low_rank import concatenate
from fedray.aggregation.points import check_weights
from fedray.methods.bases.carried_adapter import CarriedAdapter, Carrying, Server
from fedray.methods.bases.shared_adapter import ClientState, GlobalAdapter
from fedray.methods.bases.shared_adapter import Server as SharedServer
from fedray.methods.parts.carried import carry
from fedray.methods.parts.factors import by_target
from fedray.methods.protocol import Broadcast, Initial, Local, Metrics, Update
from fedray.types import Client


@dataclass(frozen=True, kw_only=True)
class Flora(Carrying):
    """A fresh LoRA every round, on top of the sum of all earlier ones.

    A round adds Σ_k r_k columns to the carried sum. Tiers may have any ranks.
    """

    def first_shared(self, initial: Initial) -> CarriedAdapter:
        return replace(super().first_shared(initial), adapter=np.zeros(0, np.float32))  # every client draws its own

    def configure_train(self, server: SharedServer, cohort: Sequence[Client]) -> list[Broadcast[GlobalAdapter]]:
        return [Broadcast(server.shared, [client.id for client in cohort])]

    def load(self, adapter: Adapter, client_state: ClientState, downlink: GlobalAdapter, local: Local) -> None:
        fresh = draw_lora(adapter.layout("lora"), local.seed, "flora", local.server_round, local.client.id)
        super().load(adapter, client_state, replace(downlink, adapter=fresh), local)

    def aggregate_train(self, server: Server, updates: Sequence[Update[GlobalAdapter]]) -> tuple[Server, Metrics]:
        if not updates:
            return server, {}
        weights = check_weights(self.counts(updates), len(updates))
        targets = by_target(server.layout, [(update.capacity, update.payload.adapter) for update in updates])
        sums = (concatenate(list(zip(weights, target, strict=True))) for target in targets)
        carried, error = carry(server.shared.carried, sums, self.carried_rank)
        head = self.mean_head(server, updates)
        return replace(server, shared=replace(server.shared, head=head, carried=carried)), {"carried_error": error}


ENTRY = Flora
