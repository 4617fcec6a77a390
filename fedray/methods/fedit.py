"""FedIT (Zhang et al., ICASSP 2024, arXiv 2305.05644): federated instruction tuning, which is FedAvg on LoRA.

The paper's settings, after its code: rank 16, alpha 16 on q_proj, lr 3e-4, 10 epochs, batch 64, 10 % of the clients.
"""

from dataclasses import dataclass

from fedray.methods.fedavg import FedAvg


@dataclass(frozen=True)
class FedIt(FedAvg):
    """FedAvg of both LoRA factors."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.requires_lora("which FedIT averages")


ENTRY = FedIt
