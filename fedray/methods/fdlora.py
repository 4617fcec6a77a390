"""FDLoRA (Qi et al., arXiv 2406.07925): a personal LoRA θ_p, a global one θ_s, and for each client a fusion of both.

    round 0:  every client trains θ_p;  θ_s ← mean of the θ_p
    later:    clients train θ_s by AdamW for a few steps;  θ_s ← θ_s + η (Δ + β m),  m ← β m + Δ,  Δ = mean θ_k − θ_s
    where the round's number is a multiple of H:  θ_p ← the client's own θ_s

An evaluation after training measures the fusion A = w_1 A_s + w_2 A_p, B = w_1 B_s + w_2 B_p, with w from a grid in
[0, 1]² by the loss on the client's validation examples (training examples, where it has none). The fused factors have
the cross terms B_s A_p and B_p A_s, so all LoRAs start from one draw.

Chosen here: round 0 is the paper's first stage, whose upload it does not count; the grid stands for its gradient-free
search with an L1 penalty; the head is not fused, but the one that the client has after the round's training; a client
that was absent in round 0 takes its first own θ_s as θ_p; the condition for H is printed the other way round in the
paper. With H = null, β = 0 and η = 1 the global LoRA is FedAvg's.

The paper's settings: 3 steps, H = 5. η = 0.7 and β = 0.9 are DiLoCo's (arXiv 2311.08105); the paper's were not checked.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from fedray.adapters.adapter import Adapter
from fedray.aggregation.server_optimizer import ServerOptimizerOption
from fedray.aggregation.server_optimizers.momentum import Momentum
from fedray.aggregation.server_optimizers.sgd import TAKE_THE_MEAN
from fedray.methods import fedavg
from fedray.methods.bases.shared_adapter import ClientState, GlobalAdapter
from fedray.methods.protocol import Averages, Broadcast, Initial, Local, Metrics
from fedray.types import Client, Split, Vector, state_type

NESTEROV = Momentum(lr=0.7, beta=0.9, nesterov=True)


@state_type("fdlora.Server")
@dataclass(frozen=True)
class Server:
    """Server state: θ_s and the head, as FedAvg's, and how many rounds clients have trained in."""

    common: fedavg.Server
    rounds: int


@dataclass(frozen=True)
class GlobalLora(GlobalAdapter):
    """Downlink: θ_s, the head, and the number of the round in which clients train; 0: the first stage."""

    number: int


@state_type("fdlora.Client")
@dataclass(frozen=True)
class FdState(ClientState):
    """Client state, with θ_p; None: the client has never trained."""

    personal: Vector | None = None


@dataclass(frozen=True)
class FdLora(fedavg.FedAvg):
    """A global LoRA with momentum on the server, fused with a personal one.

    Attributes:
        server_optimizer: moves θ_s to the clients' mean; by default Nesterov's momentum.
        interval: H, rounds between two copies of θ_s to θ_p; null: θ_p stays as it was first trained.
        inner_steps: optimizer steps on θ_s in a round, 3 in the paper; default what `train` says.
        levels: values of w_1 and of w_2 that are tried.
    """

    server_optimizer: ServerOptimizerOption = NESTEROV
    interval: Annotated[int, Field(ge=1)] | None = 5
    inner_steps: Annotated[int, Field(ge=1)] | None = None
    levels: Annotated[int, Field(ge=2)] = 5

    def __post_init__(self) -> None:
        self.requires_lora("which FDLoRA fuses")
        super().__post_init__()

    @property
    def averages(self) -> Averages | None:
        return super().averages

    def init_server(self, initial: Initial, clients: Sequence[Client]) -> Any:
        return Server(super().init_server(initial, clients), 0)

    def init_client(self, initial: Initial, client: Client) -> FdState:
        return FdState(super().init_client(initial, client).head)

    def configure_train(self, server: Any, cohort: Sequence[Client]) -> list[Broadcast[Any]]:
        common = super().configure_train(server.common, cohort)
        return [Broadcast(GlobalLora(**vars(sent.payload), number=server.rounds), sent.clients) for sent in common]

    def train(self, adapter: Adapter, downlink: GlobalAdapter, local: Local) -> None:
        assert isinstance(downlink, GlobalLora)
        local.train(steps=self.inner_steps if downlink.number else None, measure=False)

    def train_client(
        self, adapter: Adapter, client_state: ClientState, downlink: GlobalAdapter, local: Local
    ) -> tuple[GlobalAdapter, FdState]:
        assert isinstance(client_state, FdState)
        assert isinstance(downlink, GlobalLora)
        sent, kept = super().train_client(adapter, client_state, downlink, local)
        personal, number = client_state.personal, downlink.number
        own = adapter.read(self.shared)
        if personal is None or (self.interval is not None and number > 0 and number % self.interval == 0):
            personal = own
        if local.measures:
            self._fuse(adapter, own, personal, local)
            local.measure()
        return sent, FdState(kept.head, personal=personal)

    def _fuse(self, adapter: Adapter, shared: Vector, personal: Vector, local: Local) -> None:
        """Load the fusion with the least loss, the first of equal ones; θ_s alone is the first of all."""
        split: Split = "validation" if local.evaluate("validation").num_examples else "train"
        grid = np.linspace(1, 0, self.levels)
        losses = {}
        for weights in product(grid, grid[::-1]):
            adapter.load(self.shared, fusion(weights, shared, personal))
            losses[weights] = local.evaluate(split).loss
        best = min(losses, key=lambda weights: losses[weights])
        adapter.load(self.shared, fusion(best, shared, personal))
        for name, weight in zip(("global_weight", "personal_weight"), best, strict=True):
            local.record(name, float(weight))

    def aggregate_train(self, server: Any, updates: Sequence[Any]) -> tuple[Any, Metrics]:
        if not updates:
            return server, {}
        rule = self if server.rounds else replace(self, server_optimizer=TAKE_THE_MEAN)
        common, metrics = fedavg.FedAvg.aggregate_train(rule, server.common, updates)
        return Server(common, server.rounds + 1), metrics


def fusion(weights: tuple[float, float], shared: Vector, personal: Vector) -> Vector:
    """Return w_1 θ_s + w_2 θ_p."""
    return (weights[0] * shared.astype(np.float64) + weights[1] * personal).astype(np.float32)


ENTRY = FdLora
