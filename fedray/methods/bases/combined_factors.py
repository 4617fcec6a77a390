"""Methods whose server combines the clients' LoRA factors target by target, in closed form."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedray.aggregation.low_rank import LowRank
from fedray.aggregation.products import keep_alive
from fedray.methods.bases.shared_adapter import GlobalAdapter, Server, SharedAdapter
from fedray.methods.parts.factors import by_target_padded, join, split
from fedray.methods.protocol import Metrics, Update


@dataclass(frozen=True)
class Combined(SharedAdapter):
    """FedAvg's clients, and a server that needs every client's factors. Subclasses add `combine`.

    Factors of tiers with fewer components are filled up with zeros. A component that no client of the cohort holds
    keeps its A, and has B = 0: the product is that of the zeros, and can be trained again.
    """

    def __post_init__(self) -> None:
        self.requires_lora("which the server combines")

    def combine(self, factors: Sequence[LowRank], counts: Sequence[int]) -> LowRank:
        """Return the server's next factors for one target.

        Args:
            factors: the clients', all of the common rank, in the order of client ids.
            counts: what each client counts for, in any unit.
        """
        raise NotImplementedError(f"{type(self).__name__} must define combine(factors, counts)")

    def aggregate_train(self, server: Server, updates: Sequence[Update[GlobalAdapter]]) -> tuple[Server, Metrics]:
        if not updates:
            return server, {}
        counts = self.counts(updates)
        targets = by_target_padded(server.layout, [(update.capacity, update.payload.adapter) for update in updates])
        previous = split(server.layout, server.shared.adapter)
        combined = [self.combine(target, counts) for target in targets]
        adapter = join([keep_alive(new, old) for new, old in zip(combined, previous, strict=True)])
        head = self.mean_head(server, updates)
        return replace(server, shared=GlobalAdapter(adapter, head)), {}
