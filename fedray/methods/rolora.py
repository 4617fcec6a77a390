"""RoLoRA (Chen et al., NeurIPS 2025, arXiv 2502.01755): LoRA's factors are trained and averaged in turn.

Round 0 trains B, round 1 A, and so on; the other factor is common to all clients, so that the mean of the factors is
the mean of the products, in every round:

    even rounds  B ← Σ_k w_k B_k,   B̄ A = Σ_k w_k B_k A
    odd rounds   A ← Σ_k w_k A_k,   B Ā = Σ_k w_k B A_k

Clients count alike, as in the paper. They send the factor that they trained, and receive both, so that a client that
missed rounds needs nothing else. A round of A before any of B would change no output, since B starts at zero. The
server's optimizer, if it has moments, keeps those of the factor that rests.

The paper's settings, after a third party's notes: RoBERTa-large with rank 4 and 50 clients, Llama-2-7B with rank 8,
learning rates from 5e-4 to 0.1, 20 local epochs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from fedray.adapters.adapter import Adapter
from fedray.errors import ConfigError
from fedray.methods.bases.shared_adapter import ClientState, GlobalAdapter
from fedray.methods.fedavg import FedAvg
from fedray.methods.fedavg import Server as FedAvgServer
from fedray.methods.parts import heads
from fedray.methods.protocol import Averages, Initial, Local, Metrics, Uploaded
from fedray.types import Client, Vector, state_type


@state_type("rolora.Server")
@dataclass(frozen=True)
class Server(FedAvgServer):
    """Server state: both factors, and how many rounds there have been."""

    server_round: int = 0


def part(server_round: int) -> str:
    """Return the factor that trains."""
    return "A" if server_round % 2 else "B"


@dataclass(frozen=True)
class RoLora(FedAvg):
    """FedAvg of one factor at a time."""

    weights: Averages = "uniform"

    def __post_init__(self) -> None:
        self.requires_lora("which RoLoRA trains in turn")
        if self.mask != "none":
            raise ConfigError("rolora.mask: every other round sends no B whose rows could be left out; set mask: none")

    @property
    def averages(self) -> Averages:
        return self.weights

    def init_server(self, initial: Initial, clients: Sequence[Client]) -> Server:
        return Server(**vars(super().init_server(initial, clients)))

    def train(self, adapter: Adapter, downlink: GlobalAdapter, local: Local) -> None:
        local.train(heads.trainable(self.effective_head, adapter, f"lora.{part(local.server_round)}"))

    def read(self, adapter: Adapter, local: Local) -> tuple[GlobalAdapter, ClientState]:
        uplink, state = super().read(adapter, local)
        return replace(uplink, adapter=adapter.read(f"lora.{part(local.server_round)}")), state

    def aggregate_train(
        self, server: FedAvgServer, updates: Sequence[Uploaded[GlobalAdapter]]
    ) -> tuple[Server, Metrics]:
        assert isinstance(server, Server)
        trained = part(server.server_round)
        where = server.layout.mask({trained})
        factor = FedAvgServer(
            server.layout.part(trained),
            replace(server.shared, adapter=server.shared.adapter[where]),
            {name: values[where] for name, values in server.adapter_optimizer.items()},
            server.head_optimizer,
        )
        after, metrics = super().aggregate_train(factor, updates)
        moments = {
            name: put(values, where, after.adapter_optimizer[name]) for name, values in server.adapter_optimizer.items()
        }
        shared = replace(after.shared, adapter=put(server.shared.adapter, where, after.shared.adapter))
        return Server(server.layout, shared, moments, after.head_optimizer, server.server_round + 1), metrics


def put(vector: Vector, where: npt.NDArray[np.bool_], values: Vector) -> Vector:
    """Return the vector with values in some of its places."""
    changed = vector.copy()
    changed[where] = values
    return changed


ENTRY = RoLora
