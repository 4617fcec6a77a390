"""Base class of methods with one adapter for all clients: everything except how the server combines the updates.

A client receives the shared values, trains them, and sends them back. A method may share only a part of the adapter
("lora.A"); the client trains a second part and keeps it, if the method says so, and the head is treated as `head` says.
Where tiers hold parts of the adapter (`fedray.methods.parts.capacity`), payloads contain what the tier holds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fedray.adapters.adapter import Adapter
from fedray.adapters.kind import AdapterKind
from fedray.adapters.kinds.lora import LORA
from fedray.adapters.layout import Layout
from fedray.config import Head
from fedray.errors import ConfigError
from fedray.methods.parts import heads
from fedray.methods.parts.capacity import by_layout, gather
from fedray.methods.protocol import Averages, Broadcast, Initial, Local, Uploaded, name_of
from fedray.types import Client, Vector, state_type


@state_type("fedavg.Shared", "fedray.methods.fedavg.Shared")
@dataclass(frozen=True)
class GlobalAdapter:
    """What all clients have in common: the shared values of the adapter and, if it is shared, the head. Downlink and
    uplink."""

    adapter: Vector
    head: Vector | None

    def by_name(self, shared: str) -> dict[str, Vector]:
        """Return the vectors by the names of `Adapter.read`, where `shared` is that of the adapter's values."""
        return {shared: self.adapter, **({} if self.head is None else {"head": self.head})}

    def combine(self, function: Callable[..., Vector], *others: "GlobalAdapter") -> "GlobalAdapter":
        """Return a function of this one's values and the others', for the adapter and for the head, if there is one."""
        head = None if self.head is None else function(self.head, *(other.head for other in others))
        return GlobalAdapter(function(self.adapter, *(other.adapter for other in others)), head)


@state_type("shared_adapter.Server")
@dataclass(frozen=True)
class Server:
    """Server state: the shared values and their layout."""

    layout: Layout
    shared: GlobalAdapter


@state_type("fedavg.Client", "fedray.methods.fedavg.OwnHead")
@dataclass(frozen=True)
class ClientState:
    """Client state: the head, if it is private."""

    head: Vector | None


@state_type("shared_adapter.Private")
@dataclass(frozen=True)
class PrivateState(ClientState):
    """Client state of a method with a private part: that, and the head if it is private, too."""

    private: Vector


@dataclass(frozen=True)
class SharedAdapter:
    """One adapter for all clients. Subclasses add `aggregate_train`, and may override the other functions.

    Attributes:
        adapter: what is trained and shared.
        weights: what a client counts for: `examples` (n_k) or `uniform`.
    """

    head: Head = "shared"
    adapter: AdapterKind = LORA
    weights: Averages = "examples"

    @property
    def name(self) -> str:
        """The method's name in messages."""
        return name_of(self)

    @property
    def effective_head(self) -> Head:
        """How the head is treated, whatever `head` says for all methods."""
        return self.head

    @property
    def shared(self) -> str:
        """The group, or the part of one, that travels and that the server combines."""
        return self.adapter.group

    @property
    def private(self) -> str | None:
        """The part that a client trains and keeps."""
        return None

    def attach(self, model: nn.Module) -> Adapter:
        adapter = self.adapter.attach(model)
        parts = (self.shared,) if self.private is None else (self.shared, self.private)
        adapter.set_trainable(*heads.trainable(self.effective_head, adapter, *parts))
        return adapter

    def init_server(self, initial: Initial, clients: Sequence[Client]) -> Server:
        return Server(initial.layout(self.shared), self.first_shared(initial))

    def first_shared(self, initial: Initial) -> GlobalAdapter:
        """Return what the server starts from."""
        return GlobalAdapter(initial.vector(self.shared), heads.initial(self.effective_head, initial.head())[0])

    def init_client(self, initial: Initial, client: Client) -> ClientState:
        head = heads.initial(self.effective_head, initial.head())[1]
        return ClientState(head) if self.private is None else PrivateState(head, initial.vector(self.private))

    def configure_train(self, server: Server, cohort: Sequence[Client]) -> list[Broadcast[GlobalAdapter]]:
        return [
            Broadcast(replace(server.shared, adapter=gather(server.layout, own, server.shared.adapter)), ids)
            for own, ids in by_layout(server.layout, cohort).items()
        ]

    def train_client(
        self, adapter: Adapter, client_state: ClientState, downlink: GlobalAdapter, local: Local
    ) -> tuple[GlobalAdapter, ClientState]:
        self.load(adapter, client_state, downlink, local)
        self.train(adapter, downlink, local)
        return self.read(adapter, local)

    def load(self, adapter: Adapter, client_state: ClientState, downlink: GlobalAdapter, local: Local) -> None:
        """Load everything that the client starts the round with."""
        adapter.load(self.shared, downlink.adapter)
        if self.private is not None and isinstance(client_state, PrivateState):
            adapter.load(self.private, client_state.private)
        heads.load(self.effective_head, adapter, downlink.head, client_state.head)

    def train(self, adapter: Adapter, downlink: GlobalAdapter, local: Local) -> None:
        """Train what was loaded."""
        local.train()

    def read(self, adapter: Adapter, local: Local) -> tuple[GlobalAdapter, ClientState]:
        """Return what goes up and what stays."""
        head_up, head_own = heads.read(self.effective_head, adapter)
        own = ClientState(head_own) if self.private is None else PrivateState(head_own, adapter.read(self.private))
        return GlobalAdapter(adapter.read(self.shared), head_up), own

    def counts(self, updates: Sequence[Uploaded[Any]]) -> list[int]:
        """Return what each update counts for in a weighted mean, in any unit."""
        return [update.num_examples if self.weights == "examples" else update.num_clients for update in updates]

    def mean_head(self, server: Server, updates: Sequence[Uploaded[Any]]) -> Vector | None:
        """Return the weighted mean of the heads that were sent; the server's if there are none."""
        return heads.average(server.shared.head, [update.payload.head for update in updates], self.counts(updates))

    def requires_lora(self, why: str) -> None:
        """Refuse an adapter without the factors A and B.

        Raises:
            ConfigError: the adapter's group is not "lora".
        """
        if self.adapter.group != "lora":
            kind = self.adapter.label
            raise ConfigError(f"{self.name}.adapter: {kind} has no factors A and B, {why}; use adapter: lora")
