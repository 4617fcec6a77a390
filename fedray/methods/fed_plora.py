"""Fed-PLoRA (ICLR 2026, arXiv 2602.16936): R parallel LoRAs of rank 1, of which a client trains as many as it can.

In every round client k draws r_k of the R components of the common LoRA, and trains these; all others are part of its
base model, frozen:

    y = W0 x + s Σ_{i in I_k} b_i a_i drop(x) + s Σ_{i not in I_k} b_i a_i x,     |I_k| = r_k

    (a_i, b_i) ← mean of (a_i, b_i) over the clients that trained component i, or as it was if there are none

so that every client sees the whole common model, and no component is left to the strong clients. I_k is keyed by (seed,
round, client). With r_k = R for all clients it is FedIT with uniform weights.

Departures: nothing is merged into the base weights; the other components are a frozen second branch.

The paper's settings, after a third party's notes: LoRA on the attention layers, 10 % of the clients in a round.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from torch import nn

from fedray.adapters.adapter import Adapter
from fedray.adapters.layout import Layout
from fedray.adapters.lora import attach_lora
from fedray.aggregation.low_rank import LowRank
from fedray.aggregation.masks import Mask, pack, unpack
from fedray.config import Head, LoraSection
from fedray.methods.bases.shared_adapter import ClientState, GlobalAdapter, Server
from fedray.methods.parts import heads
from fedray.methods.parts.capacity import Places, held_mean
from fedray.methods.parts.factors import join, split
from fedray.methods.protocol import Averages, Broadcast, Initial, Local, Metrics, Update
from fedray.types import Client, Vector


@dataclass(frozen=True)
class Components(GlobalAdapter):
    """Uplink: `adapter` has only the trained components.

    Attributes:
        trained: which, as a bitset; None: all.
    """

    trained: npt.NDArray[np.uint8] | None


@dataclass(frozen=True)
class FedPLora:
    """Random components of one common LoRA; a client trains as many as its tier's rank.

    Attributes:
        common_lora: the section `lora` without the tier's limit; its rank is R.
        weights: what a client counts for in a component's mean: `uniform` (the paper) or `examples` (n_k).
    """

    lora: LoraSection
    common_lora: LoraSection
    head: Head = "shared"
    weights: Averages = "uniform"

    def attach(self, model: nn.Module) -> Adapter:
        others = self.common_lora.rank - self.lora.rank
        adapter = attach_lora(model, self.lora, rest_rank=others or None, rest_dropout=False)
        adapter.set_trainable(*heads.trainable(self.head, adapter, "lora"))
        return adapter

    def init_server(self, initial: Initial, clients: Sequence[Client]) -> Server:
        head = heads.initial(self.head, initial.head())[0]
        return Server(initial.layouts["lora"], GlobalAdapter(initial.vectors["lora"], head))

    def init_client(self, initial: Initial, client: Client) -> ClientState:
        return ClientState(heads.initial(self.head, initial.head())[1])

    def configure_train(self, server: Server, cohort: Sequence[Client]) -> Broadcast[GlobalAdapter]:
        return Broadcast(server.shared, [client.id for client in cohort])

    def train_client(
        self, adapter: Adapter, client_state: ClientState, downlink: GlobalAdapter, local: Local
    ) -> tuple[Components, ClientState]:
        rank = self.common_lora.rank
        trained = np.zeros(rank, bool)
        trained[local.rng("fed_plora").choice(rank, self.lora.rank, replace=False)] = True
        common = split(_of_rank(adapter.layout("lora"), rank), downlink.adapter)
        adapter.load("lora", _chosen(common, trained))
        if "rest" in adapter.names:
            adapter.load("rest", _chosen(common, ~trained))
        heads.load(self.head, adapter, downlink.head, client_state.head)
        local.train()
        head_up, head_own = heads.read(self.head, adapter)
        bits = None if trained.all() else pack(trained)
        return Components(adapter.read("lora"), head_up, bits), ClientState(head_own)

    def aggregate_train(self, server: Server, updates: Sequence[Update[Components]]) -> tuple[Server, Metrics]:
        counts = [update.num_examples if self.weights == "examples" else 1 for update in updates]
        held = [(_places(server.layout, update.payload.trained), update.payload.adapter) for update in updates]
        adapter = held_mean(server.shared.adapter, held, counts)
        head = heads.average(server.shared.head, [update.payload.head for update in updates], counts)
        return replace(server, shared=GlobalAdapter(adapter, head)), {}


def _of_rank(layout: Layout, rank: int) -> Layout:
    """Return a LoRA's layout with another number of components."""
    slots = layout.slots
    shapes = [(rank, slot.shape[1]) if slot.part == "A" else (slot.shape[0], rank) for slot in slots]
    return Layout(tuple(replace(slot, shape=shape) for slot, shape in zip(slots, shapes, strict=True)))


def _chosen(common: Sequence[LowRank], components: Mask) -> Vector:
    """Return the vector of some components of every target."""
    return join([LowRank(B=target.B[:, components], A=target.A[components]) for target in common])


def _places(common: Layout, trained: npt.NDArray[np.uint8] | None) -> Places | None:
    """Return where the values of the trained components lie in the common vector; None: everywhere, in order."""
    if trained is None:
        return None
    mask = unpack(trained, common.slots[0].shape[0])
    found: list[Places] = []
    for slot, start in zip(common.slots, common.offsets, strict=True):
        inside: Places = start + np.arange(slot.size).reshape(slot.shape)
        found.append((inside[mask] if slot.part == "A" else inside[:, mask]).reshape(-1))
    return np.concatenate(found)


ENTRY = FedPLora
