"""FedEx-LoRA (Singhal et al., ACL 2025, arXiv 2410.09432): FedAvg of both factors, and what that misses
is carried along.

    A ← Ā,  B ← B̄,  C ← C + E,    E = Σ_k w_k B_k A_k − B̄ Ā = Σ_{k<K} w_k (B_k − B̄)(A_k − A_K)

so that B̄ Ā + C is the clients' mean model exactly, and the factors train on. (K − 1) r columns hold E; stacking its
terms as they stand takes (K + 1) r.

Departures: the paper adds E to the base weights; here nothing is merged, and C is carried in a frozen second branch.
The paper has one rank: where tiers have fewer components, factors are filled up with zeros and E is that of the filled
factors, so that the server's model is the exact mean again, of which such a tier receives its leading components and C.
A component that no client of the cohort holds keeps its A, with B = 0, and can be trained again.

The paper's settings, after its code: GLUE with rank 4, alpha 8, lr 1e-3, 3 clients, 50 rounds, 3 epochs, batch 128;
GPT-2 on E2E with rank 4, alpha 32, lr 2e-3.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedray.aggregation.products import keep_alive, mean_factors, residual
from fedray.methods.bases.carried_adapter import CarriedAdapter, Carrying, Server
from fedray.methods.bases.shared_adapter import GlobalAdapter
from fedray.methods.parts.carried import carry
from fedray.methods.parts.factors import by_target_padded, join, split
from fedray.methods.protocol import Metrics, Update


@dataclass(frozen=True, kw_only=True)
class FedExLora(Carrying):
    """FedAvg of both factors with the exact mean model.

    A round adds (K − 1) r columns to the carried sum. One client, or a common A, adds nothing but zeros: FedAvg.
    """

    def aggregate_train(self, server: Server, updates: Sequence[Update[GlobalAdapter]]) -> tuple[Server, Metrics]:
        if not updates:
            return server, {}
        counts = self.counts(updates)
        targets = by_target_padded(server.layout, [(update.capacity, update.payload.adapter) for update in updates])
        carried, error = carry(
            server.shared.carried, (residual(target, counts) for target in targets), self.carried_rank
        )
        previous = split(server.layout, server.shared.adapter)
        means = [mean_factors(target, counts) for target in targets]
        adapter = join([keep_alive(mean, old) for mean, old in zip(means, previous, strict=True)])
        head = self.mean_head(server, updates)
        return replace(server, shared=CarriedAdapter(adapter, head, carried)), {"carried_error": error}


ENTRY = FedExLora
