"""FedRep (Collins et al., ICML 2021, arXiv 2102.07078): a common body and a head of each client's own, trained in turn.

In every round client k first trains its head h_k for some epochs on the body φ^t that it received, then the body with
that head:

    h_k  ←  argmin_h L_k(φ^t, h),  approximately      (`head_epochs`)
    φ_k  ←  argmin_φ L_k(φ, h_k),  approximately      (`train.epochs`)

The server averages the bodies, here the adapters, as FedAvg does; heads never travel. FedPer trains both at once.
Each of the two trainings has an optimizer and batches of its own; `train.max_steps` limits either.

In the paper the head takes many local steps and the body few; its default of 10 epochs is a choice made here.
"""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from fedray.adapters.adapter import Adapter
from fedray.methods.bases.shared_adapter import GlobalAdapter
from fedray.methods.fedper import FedPer
from fedray.methods.protocol import Local


@dataclass(frozen=True)
class FedRep(FedPer):
    """FedPer whose clients train the head first, then the body.

    Attributes:
        head_epochs: e_h, epochs of the head alone.
    """

    head_epochs: Annotated[float, Field(gt=0)] = 10.0

    def train(self, adapter: Adapter, downlink: GlobalAdapter, local: Local) -> None:
        local.train(["head"], epochs=self.head_epochs, measure=False)
        local.train([self.shared])


ENTRY = FedRep
