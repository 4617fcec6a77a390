"""FedBABU (Oh, Kim and Yun, ICLR 2022, arXiv 2106.06042): only the body is federated, under a head that stays at its
first random draw, and everything is fine-tuned before it is evaluated.

    φ ← Σ_k w_k φ_k,   φ_k trained with the common draw h_0 as its head

The body, here the adapter, learns features that fit an untrained head, instead of following a head that
averaging changes. Where a round is measured, every client then fine-tunes body and head for `tune_epochs` and is
evaluated (`personalised`); that training is for the evaluation alone, and nothing of it is sent or kept.

The head is drawn as `head: frozen_random` draws it. It is the control of `head: frozen_label_text`: the same training,
without what the labels' names say. `fedray params` counts what a round trains, so the body alone.
"""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import nn

from fedray.adapters.adapter import Adapter
from fedray.config import Head
from fedray.methods.bases.shared_adapter import ClientState, GlobalAdapter
from fedray.methods.fedavg import FedAvg
from fedray.methods.parts import heads
from fedray.methods.protocol import Initial, Local
from fedray.types import Client


@dataclass(frozen=True)
class FedBabu(FedAvg):
    """FedAvg under a random head, whatever `head` says for the other methods.

    Attributes:
        tune_epochs: epochs of fine-tuning before an evaluation, in the paper a few; 0 evaluates the common model.
    """

    head: Head = "frozen_random"
    tune_epochs: Annotated[float, Field(ge=0)] = 1.0

    @property
    def effective_head(self) -> Head:
        return "frozen_random"

    def attach(self, model: nn.Module) -> Adapter:
        adapter = super().attach(model)
        heads.require_head(self.name, adapter)
        adapter.set_trainable(self.shared, "head")
        return adapter

    def init_client(self, initial: Initial, client: Client) -> ClientState:
        return ClientState(initial.head())

    def load(self, adapter: Adapter, client_state: ClientState, downlink: GlobalAdapter, local: Local) -> None:
        assert client_state.head is not None
        super().load(adapter, client_state, downlink, local)
        adapter.load("head", client_state.head)

    def train(self, adapter: Adapter, downlink: GlobalAdapter, local: Local) -> None:
        local.train([self.shared], measure=self.tune_epochs == 0)

    def train_client(
        self, adapter: Adapter, client_state: ClientState, downlink: GlobalAdapter, local: Local
    ) -> tuple[GlobalAdapter, ClientState]:
        uplink, _ = super().train_client(adapter, client_state, downlink, local)
        if self.tune_epochs and local.measures:
            local.train(epochs=self.tune_epochs)
        return uplink, client_state


ENTRY = FedBabu
