"""FedProx (Li et al., MLSys 2020, arXiv 1812.06127): FedAvg whose clients are held close to where they started.

Client k minimises its loss plus a proximal term around θ^t, the values that it received:

    L_k(θ) + μ/2 ‖θ − θ^t‖²,   that is, every step's gradient is g + μ (θ − θ^t).

The server averages as FedAvg does. Where the text leaves a choice: the term acts on the raw factors of LoRA and on a
shared head, not on a head that the client keeps; it is added before the gradient is clipped, and is no part of the
reported loss. The paper's variable amount of local work is not simulated. With a single local step the term is zero,
and with μ = 0 everything is FedAvg, bit for bit.

The paper tunes μ among 0.001, 0.01, 0.1 and 1.
"""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from fedray.adapters.adapter import Adapter
from fedray.methods.bases.shared_adapter import GlobalAdapter
from fedray.methods.fedavg import FedAvg
from fedray.methods.protocol import Local
from fedray.training.steering import Proximal


@dataclass(frozen=True)
class FedProx(FedAvg):
    """FedAvg with a proximal term.

    Attributes:
        mu: μ, usually 0.001 to 1; 0 is FedAvg.
    """

    mu: Annotated[float, Field(ge=0)] = 0.01

    def train(self, adapter: Adapter, downlink: GlobalAdapter, local: Local) -> None:
        local.train(steering=Proximal(downlink.by_name(self.shared), self.mu))


ENTRY = FedProx
