"""Ditto (Li et al., ICML 2021, arXiv 2012.04221): FedAvg for a common model w, and beside it a personal model v_k that
is held close to it.

    w:    FedAvg, unchanged
    v_k:  every step's gradient is g + λ (v_k − w^t), with w^t as the client received it

Only w travels; v_k stays with its client, and is what `personalised` measures. With λ = 0 the personal models are those
of training without communication (`local`), and the larger λ, the closer they stay to w.

Where the text leaves a choice: both trainings of a round see the same batches, v_k has the common draw as its first
value, and the term acts on the raw factors of LoRA and on a shared head. A head that clients keep exists twice, for w
and for v_k, and that of v_k is held close to nothing. A round costs twice the steps of FedAvg.

The paper takes λ from 0.05 to 2, tuned per client on validation data; here all clients have the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field

from fedray.adapters.adapter import Adapter
from fedray.methods.bases.shared_adapter import ClientState, GlobalAdapter
from fedray.methods.fedavg import FedAvg
from fedray.methods.parts import heads
from fedray.methods.protocol import Initial, Local
from fedray.training.steering import Proximal
from fedray.types import Client, Vector, state_type


@state_type("ditto.Client")
@dataclass(frozen=True, kw_only=True)
class DittoState(ClientState):
    """Client state.

    Attributes:
        personal: v_k by name: the adapter's group, and the head if it trains.
    """

    personal: Mapping[str, Vector]


@dataclass(frozen=True)
class Ditto(FedAvg):
    """FedAvg with a personal model per client.

    Attributes:
        lam: λ, usually 0.05 to 2; 0 leaves the personal models to themselves.
    """

    lam: Annotated[float, Field(ge=0)] = 0.1

    def init_client(self, initial: Initial, client: Client) -> DittoState:
        first = super().init_client(initial, client)
        personal = {self.shared: initial.vector(self.shared)}
        if (head := initial.head()) is not None and self.effective_head not in heads.FROZEN:
            personal["head"] = head
        return DittoState(head=first.head, personal=personal)

    def train(self, adapter: Adapter, downlink: GlobalAdapter, local: Local) -> None:
        local.train(measure=False)

    def train_client(
        self, adapter: Adapter, client_state: ClientState, downlink: GlobalAdapter, local: Local
    ) -> tuple[GlobalAdapter, DittoState]:
        assert isinstance(client_state, DittoState)
        uplink, kept = super().train_client(adapter, client_state, downlink, local)
        for name, vector in client_state.personal.items():
            adapter.load(name, vector)
        local.train(steering=Proximal(downlink.by_name(self.shared), self.lam), phase=0)
        personal = {name: adapter.read(name) for name in client_state.personal}
        return uplink, replace(client_state, head=kept.head, personal=personal)


ENTRY = Ditto
