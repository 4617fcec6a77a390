"""Base class of methods whose server carries along a sum of products (`fedray.methods.parts.carried`)."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from fedray.adapters.adapter import Adapter
from fedray.adapters.kinds.lora import LoraKind
from fedray.errors import ConfigError
from fedray.methods.bases.shared_adapter import ClientState, GlobalAdapter, SharedAdapter
from fedray.methods.bases.shared_adapter import Server as SharedServer
from fedray.methods.parts import carried, heads
from fedray.methods.parts.factors import Delta, zero
from fedray.methods.protocol import Initial, Local
from fedray.types import Client, state_type


@state_type("carried.Shared")
@dataclass(frozen=True)
class CarriedAdapter(GlobalAdapter):
    """What all clients have in common, with the carried sum: as many columns as there are so far."""

    carried: Delta


@state_type("carried.Server")
@dataclass(frozen=True)
class Server(SharedServer):
    """Server state."""

    shared: CarriedAdapter


@dataclass(frozen=True, kw_only=True)
class Carrying(SharedAdapter):
    """One LoRA for all clients, on top of a carried sum C: y = W0 x + s · B A drop(x) + s · C x.

    Attributes:
        carried_rank: q, how many columns of C are kept. A run is exact if q is at least the number of rounds times the
            columns that a round adds, or min(d_out, d_in) of every target. Where q is smaller, C is truncated, and
            `carried_error` in rounds.parquet is the relative error of that. Clients hold q columns in every round, and
            receive as many as there are so far.
    """

    carried_rank: int

    def __post_init__(self) -> None:
        self.requires_lora("whose products are carried along")
        if type(self.adapter) is not LoraKind:
            kind = type(self.adapter).__name__
            raise ConfigError(f"{self.name}.adapter: {kind} has no branch for the carried sum; use adapter: lora")
        if self.carried_rank < 1:
            raise ConfigError(f"{self.name}.carried_rank: expected at least 1, got {self.carried_rank}")

    def attach(self, model: nn.Module) -> Adapter:
        assert isinstance(self.adapter, LoraKind)
        adapter = carried.attach(model, self.adapter.lora, self.carried_rank)
        adapter.set_trainable(*heads.trainable(self.effective_head, adapter, self.shared))
        return adapter

    def init_server(self, initial: Initial, clients: Sequence[Client]) -> Server:
        return Server(initial.layout(self.shared), self.first_shared(initial))

    def first_shared(self, initial: Initial) -> CarriedAdapter:
        first = super().first_shared(initial)
        return CarriedAdapter(first.adapter, first.head, zero(initial.layout(self.shared)))

    def load(self, adapter: Adapter, client_state: ClientState, downlink: GlobalAdapter, local: Local) -> None:
        assert isinstance(downlink, CarriedAdapter)
        super().load(adapter, client_state, downlink, local)
        carried.load(adapter, downlink.carried)
