"""SCAFFOLD (Karimireddy et al., ICML 2020, arXiv 1910.06378): control variates against the drift of local training.

The server keeps c, an estimate of the common gradient, and every client c_k, an estimate of its own; all start at 0.

    client:  every step's gradient is g − c_k + c;   c_k⁺ = the mean of g over the steps;   sends θ_k and c_k⁺ − c_k
    server:  θ ← θ + η_g mean_S (θ_k − θ),   c ← c + |S|/N mean_S (c_k⁺ − c_k)

for the cohort S among all N clients, which count alike. Twice FedAvg's numbers travel in both directions. η_g is the
learning rate of the server optimizer, `server_optimizer: {name: sgd, lr: 0.5}`; 1 takes the mean.

Departures: the paper's option II, c_k⁺ = c_k − c + (θ − θ_k) / (steps · η), is the mean gradient of the local steps if
these are plain SGD with a constant rate. The mean itself is taken, raw: before the control variates and before
clipping. It needs no learning rate, so schedules, clipping and other optimizers are allowed; with AdamW, which rescales
what it is given, SCAFFOLD is a heuristic. A head that clients keep has no control variates. Where tiers hold parts of
the adapter, S and N are, for each value, those who hold it.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from fedray.adapters.adapter import Adapter
from fedray.adapters.layout import Layout
from fedray.errors import ConfigError
from fedray.methods.bases.shared_adapter import ClientState, GlobalAdapter
from fedray.methods.bases.shared_adapter import Server as SharedServer
from fedray.methods.fedavg import FedAvg
from fedray.methods.fedavg import Server as FedAvgServer
from fedray.methods.parts import heads
from fedray.methods.parts.capacity import Places, held_mean, own_layout, places
from fedray.methods.protocol import Averages, Broadcast, Initial, Local, Metrics, Uploaded
from fedray.training.steering import Shift
from fedray.types import Client, state_type


@state_type("scaffold.Server")
@dataclass(frozen=True, kw_only=True)
class Server(FedAvgServer):
    """Server state, with c, and how many of all clients hold what of the adapter."""

    control: GlobalAdapter
    population: tuple[tuple[Layout, int], ...]


@dataclass(frozen=True)
class Controlled(GlobalAdapter):
    """Downlink θ and c; uplink θ_k and c_k⁺ − c_k."""

    control: GlobalAdapter


@state_type("scaffold.Client")
@dataclass(frozen=True, kw_only=True)
class ScaffoldState(ClientState):
    """Client state.

    Attributes:
        control: c_k.
    """

    control: GlobalAdapter


@dataclass(frozen=True)
class Scaffold(FedAvg):
    """FedAvg of clients that count alike, with control variates."""

    personalised: ClassVar[bool] = False
    weights: Literal["uniform"] = "uniform"

    def __post_init__(self) -> None:
        if self.mask != "none":
            raise ConfigError("scaffold.mask: rows that are left out would have no control variates; set mask: none")

    @property
    def averages(self) -> Averages:
        return self.weights

    def init_server(self, initial: Initial, clients: Sequence[Client]) -> Server:
        start = super().init_server(initial, clients)
        held = Counter(own_layout(start.layout, client.capacity) for client in clients)
        return Server(**vars(start), control=start.shared.combine(np.zeros_like), population=tuple(held.items()))

    def init_client(self, initial: Initial, client: Client) -> ScaffoldState:
        first = super().init_client(initial, client)
        return ScaffoldState(head=first.head, control=self.first_shared(initial).combine(np.zeros_like))

    def configure_train(self, server: SharedServer, cohort: Sequence[Client]) -> list[Broadcast[GlobalAdapter]]:
        assert isinstance(server, Server)
        controls = super().configure_train(replace(server, shared=server.control), cohort)
        return [
            Broadcast(Controlled(sent.payload.adapter, sent.payload.head, control.payload), sent.clients)
            for sent, control in zip(super().configure_train(server, cohort), controls, strict=True)
        ]

    def train_client(
        self, adapter: Adapter, client_state: ClientState, downlink: GlobalAdapter, local: Local
    ) -> tuple[GlobalAdapter, ScaffoldState]:
        assert isinstance(client_state, ScaffoldState)
        assert isinstance(downlink, Controlled)
        self.load(adapter, client_state, downlink, local)
        common, own = downlink.control, client_state.control
        shift = common.combine(np.subtract, own).by_name(self.shared)
        mean = local.train(steering=Shift(shift), mean_gradient=True)
        control = GlobalAdapter(mean[self.shared], None if own.head is None else mean["head"])
        sent, kept = self.read(adapter, local)
        change = control.combine(np.subtract, own)
        return Controlled(sent.adapter, sent.head, change), ScaffoldState(head=kept.head, control=control)

    def aggregate_train(
        self, server: FedAvgServer, updates: Sequence[Uploaded[GlobalAdapter]]
    ) -> tuple[Server, Metrics]:
        assert isinstance(server, Server)
        after, metrics = super().aggregate_train(server, updates)
        assert isinstance(after, Server)
        if not updates:
            return after, metrics
        layout, old, counts = server.layout, server.control, [update.num_clients for update in updates]
        changes = [update.payload.control for update in updates if isinstance(update.payload, Controlled)]
        held = [places(layout, own_layout(layout, update.capacity)) for update in updates]
        mean = held_mean(
            np.zeros_like(old.adapter), [(w, c.adapter) for w, c in zip(held, changes, strict=True)], counts
        )
        population = [(places(layout, own), number) for own, number in server.population]
        share = _holders(layout.size, zip(held, counts, strict=True)) / _holders(layout.size, population)
        adapter, head = (old.adapter + share * mean).astype(np.float32), old.head
        mean_head = heads.average(None, [change.head for change in changes], counts)
        if head is not None and mean_head is not None:
            head = head + np.float32(sum(counts) / sum(number for _, number in population)) * mean_head
        return replace(after, control=GlobalAdapter(adapter, head)), metrics


def _holders(size: int, held: Iterable[tuple[Places | None, int]]) -> npt.NDArray[np.float64]:
    """Return how many clients hold each value, at least 1. [size]"""
    found = np.zeros(size)
    for where, number in held:
        found[slice(None) if where is None else where] += number
    return np.maximum(found, 1)


ENTRY = Scaffold
