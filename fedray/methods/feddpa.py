"""FedDPA (Yang et al., NeurIPS 2024, arXiv 2403.19211): a global LoRA, averaged, and a local one that stays.

    y = W0 x + (1 − α) · s · B A x + α · s · B_k A_k x

-F: the global LoRA is federated; for an evaluation the local one starts from it and is fine-tuned alone.
-T: from the second round on every client first trains its local LoRA, with α = 0.5 and the global one frozen, and then
the global one alone (α = 0), together with the head.

In an evaluation every example has its own weight (`fedray.adapters.similarity`),

    α(x) = λ · mean over i of cos(h(x), h(x_i)),

with h the last hidden state of the prompt's last token and x_i five random training examples of the client. h is that
of the model with the local LoRA alone, as in the official code. Before local training (`aggregated`) α is 0.

Chosen here: both LoRAs of -T see batches of their own, the head trains with the global one only; so the global LoRA is
FedAvg's. The official inference script gives α to the global LoRA, and its batched default generates all answers before
the weights are set; here they are as the paper has them. Every round that is measured fine-tunes -F anew.

The paper's settings: q and v, rank 8, alpha 16, lr 3e-4, 10 epochs, 20 rounds, 8 tasks of FLAN, α and λ 0.5.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from fedray.adapters.adapter import Adapter
from fedray.adapters.mixers import Mixer
from fedray.methods.bases.personal_branch import PersonalBranch
from fedray.methods.bases.shared_adapter import ClientState, GlobalAdapter
from fedray.methods.protocol import Averages, Local, needs


@dataclass(frozen=True)
class FedDpa(PersonalBranch):
    """FedAvg of a LoRA beside a local one, weighted per example.

    Attributes:
        weights: `uniform` (the paper) or `examples`.
        variant: `T` trains both LoRAs in every round, `F` the local one for evaluations only.
        alpha: α while the local LoRA of -T trains; 1 trains it alone.
        lam: λ, the largest α(x); 0 evaluates the global LoRA alone.
        instances: training examples that an example is compared with.
    """

    weights: Averages = "uniform"
    variant: Literal["T", "F"] = "T"
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.5
    lam: Annotated[float, Field(ge=0, le=1)] = 0.5
    instances: Annotated[int, Field(ge=1)] = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        needs(self, "alpha", self.variant == "T", "variant: T")

    @property
    def mixer(self) -> Mixer:
        return "similarity"

    @property
    def private(self) -> str | None:
        return "rest" if self.variant == "T" else None

    def load(self, adapter: Adapter, client_state: ClientState, downlink: GlobalAdapter, local: Local) -> None:
        super().load(adapter, client_state, downlink, local)
        if self.variant == "F":
            adapter.load("rest", downlink.adapter)
        adapter.load("gate", np.zeros(adapter.layout("gate").size, np.float32))

    def train(self, adapter: Adapter, downlink: GlobalAdapter, local: Local) -> None:
        if self.variant == "T" and local.server_round > 0:
            weigh(adapter, self.alpha)
            local.train(["rest"], phase=1, measure=False)
        weigh(adapter, 0.0)
        local.train(self.common(adapter), phase=0, measure=False)

    def train_client(
        self, adapter: Adapter, client_state: ClientState, downlink: GlobalAdapter, local: Local
    ) -> tuple[GlobalAdapter, ClientState]:
        sent = super().train_client(adapter, client_state, downlink, local)
        if local.measures:
            weigh(adapter, 1.0)
            if self.variant == "F":
                local.train(["rest"], phase=1, measure=False)
            if self.variant == "F" or local.server_round > 0:
                self._compare(adapter, local)
            local.measure()
        return sent

    def _compare(self, adapter: Adapter, local: Local) -> None:
        """Load what the examples of an evaluation are compared with."""
        number = local.client.num_examples
        rows = local.rng("instances").permutation(number)[: self.instances]
        states = local.features("train", rows.tolist()).astype(np.float64)
        directions = states / np.maximum(np.linalg.norm(states, axis=1, keepdims=True), 1e-12)
        adapter.load("gate", (self.lam * directions.mean(0)).astype(np.float32))


def weigh(adapter: Adapter, alpha: float) -> None:
    """Give the local LoRA of every target the weight α, and the global one 1 − α."""
    for part, weight in (("mixer.w_R", alpha), ("mixer.w_L", 1 - alpha)):
        adapter.load(part, np.full(adapter.layout(part).size, weight, np.float32))


ENTRY = FedDpa
