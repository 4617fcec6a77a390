"""FlexLoRA (Bai et al., NeurIPS 2024, arXiv 2402.11505): the mean of the products, and its best approximation.

    U Σ Vᵀ ← SVD_r(Σ_k w_k B_k A_k)        B ← U Σ        A ← Vᵀ

Client k receives the first r_k components: since the components are in the order of the singular values σ_i, these are
the best approximation of rank r_k. With r >= Σ_k r_k nothing is lost; for one rank the error is never above FedIT's,
whose product B̄ Ā has rank r, too.

The factors are those of the released code. Balanced ones, √σ_i on both sides, have the same product, but a small A
while the product is small, and so a small gradient of B: k7_twin.yaml ended 5 to 8 points lower in each of three
seeds.

Departures: all tiers have the scale s, where the code has s = 16 / r_k. A component without singular value would have
no gradient; it gets its A_i from a draw keyed by the seed, and B_i = 0.

The paper's settings, after its code: ranks 8, 30 and 200 on seven modules, 1 epoch, SGD with its rate halved at round
15, 1613 clients.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedray.adapters.draws import draw_lora
from fedray.aggregation.low_rank import concatenate, truncate
from fedray.aggregation.points import check_weights
from fedray.aggregation.products import live, unit_rows
from fedray.methods.bases.shared_adapter import GlobalAdapter, SharedAdapter
from fedray.methods.bases.shared_adapter import Server as SharedServer
from fedray.methods.parts.factors import by_target, join, split
from fedray.methods.protocol import Initial, Metrics, Update
from fedray.types import Client, state_type


@state_type("flexlora.Server")
@dataclass(frozen=True)
class Server(SharedServer):
    """Server state: the shared values, their layout, and the experiment's seed."""

    seed: int


@dataclass(frozen=True)
class FlexLora(SharedAdapter):
    """The mean product's leading components."""

    def __post_init__(self) -> None:
        self.requires_lora("whose products FlexLoRA averages")

    def init_server(self, initial: Initial, clients: Sequence[Client]) -> Server:
        return Server(initial.layout(self.shared), self.first_shared(initial), initial.seed)

    def aggregate_train(self, server: Server, updates: Sequence[Update[GlobalAdapter]]) -> tuple[Server, Metrics]:
        if not updates:
            return server, {}
        layout, weights = server.layout, check_weights(self.counts(updates), len(updates))
        targets = by_target(layout, [(update.capacity, update.payload.adapter) for update in updates])
        drawn = split(layout, draw_lora(layout, server.seed, "flexlora"))
        adapter = join(
            [
                live(unit_rows(truncate(concatenate(list(zip(weights, target, strict=True))), draw.rank)), draw.A)
                for target, draw in zip(targets, drawn, strict=True)
            ]
        )
        head = self.mean_head(server, updates)
        return replace(server, shared=GlobalAdapter(adapter, head)), {}


ENTRY = FlexLora
