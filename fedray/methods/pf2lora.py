"""PF2LoRA (Hao et al., arXiv 2503.03920): a common LoRA, and a personal one of small rank on top of it.

    y = W0 x + s · B A x + s · D_k C_k x

A, B [rank r] are FedAvg's; C_k, D_k [rank r̃] stay with client k, so that the rank of what a client has lies between
r − r̃ and r + r̃. The paper solves a bilevel problem, with C, D below and a hypergradient for A, B above. Here it is
solved to first order: in every round C, D train while A, B rest, and then A, B and the head while C, D rest.

With r̃ = 0 it is FedAvg. C starts at a draw that is common to all clients, D at 0.

Settings after a third party's notes: RoBERTa-base, r = 8, r̃ = 2, 10 steps between communications, 8 clients.
"""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from fedray.adapters.adapter import Adapter
from fedray.methods.bases.personal_branch import PersonalBranch
from fedray.methods.bases.shared_adapter import GlobalAdapter
from fedray.methods.protocol import Local


@dataclass(frozen=True)
class Pf2Lora(PersonalBranch):
    """FedAvg of a LoRA beside a personal one.

    Attributes:
        personal: r̃, the rank of C and D; 0 is FedAvg.
        interval: optimizer steps of each in a round, 10 in the paper; default what `train` says, for each.
    """

    personal: Annotated[int, Field(ge=0)] = 2
    interval: Annotated[int, Field(ge=1)] | None = None

    @property
    def personal_rank(self) -> int:
        return self.personal

    def train(self, adapter: Adapter, downlink: GlobalAdapter, local: Local) -> None:
        if self.private is not None:
            local.train([self.private], steps=self.interval, phase=1, measure=False)
        local.train(self.common(adapter), steps=self.interval, phase=0)


ENTRY = Pf2Lora
