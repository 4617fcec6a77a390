"""FedSA-LoRA (Guo et al., ICLR 2025, arXiv 2410.01463): A is shared, and every client keeps its own B.

    A ← Σ_k w_k A_k

Both factors train; only A travels. The head is private, too, as in the official runs on GLUE; their code shares one
model object among all clients, so its published figures need not be those of a B that is private.

The paper's settings, after its code: RoBERTa-large, rank 8, alpha 16, dropout 0.05, SGD with lr 0.02, 10 local steps,
1000 rounds, 3 clients, Dirichlet 0.5; Llama-3-8B on GSM8K with lr 0.005, 30 steps, 100 rounds.
"""

from dataclasses import dataclass

from fedray.config import Head
from fedray.methods.fedavg import FedAvg


@dataclass(frozen=True)
class FedSaLora(FedAvg):
    """FedAvg of A, with a private B.

    Attributes:
        head: `local` (the official runs) or `shared`.
    """

    head: Head = "local"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.requires_lora("of which FedSA-LoRA shares A")

    @property
    def shared(self) -> str:
        return "lora.A"

    @property
    def private(self) -> str:
        return "lora.B"


ENTRY = FedSaLora
