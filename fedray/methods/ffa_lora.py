"""FFA-LoRA (Sun et al., ICLR 2024, arXiv 2403.12313): A stays at its common first draw A_0, and only B is trained.

    B ← Σ_k w_k B_k,   so that   B̄ A_0 = Σ_k w_k B_k A_0:

the mean of the factors is the mean of the products, which FedAvg misses. A_0 follows from the seed and never travels.
The paper's settings, after a third party's notes: RoBERTa-large, rank 8, alpha 16, SGD, 10 local steps, batch 200, 1000
rounds, 3 clients.
"""

from dataclasses import dataclass

from fedray.adapters.adapter import Adapter
from fedray.adapters.draws import draw_lora
from fedray.methods.bases.shared_adapter import ClientState, GlobalAdapter
from fedray.methods.fedavg import FedAvg
from fedray.methods.protocol import Local


@dataclass(frozen=True)
class FfaLora(FedAvg):
    """FedAvg of B, with A frozen at the common draw."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.requires_lora("of which FFA-LoRA trains B")

    @property
    def shared(self) -> str:
        return "lora.B"

    def load(self, adapter: Adapter, client_state: ClientState, downlink: GlobalAdapter, local: Local) -> None:
        adapter.load("lora.A", draw_lora(adapter.layout("lora.A"), local.seed))
        super().load(adapter, client_state, downlink, local)


ENTRY = FfaLora
