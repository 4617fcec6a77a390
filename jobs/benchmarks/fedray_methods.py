"""Custom methods for rows that no built-in method covers. They do not call `local.train()`, or they wrap a built-in
method to give every client more private state."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from local_work import local_work
from torch import nn

from fedray.adapters.adapter import Adapter
from fedray.adapters.kinds.lora import LoraKind
from fedray.adapters.lora import attach_lora
from fedray.config import LoraSection, ReftSection
from fedray.methods.bases.shared_adapter import ClientState, GlobalAdapter
from fedray.methods.fedavg import FedAvg, Server
from fedray.methods.protocol import Averages, Broadcast, Initial, Local, Metrics, Update, Uploaded
from fedray.training.trainer import LocalTrainer
from fedray.types import Client, Vector, state_type


@state_type("benchmarks.Numbers")
@dataclass(frozen=True)
class Numbers:
    """Server state, downlink, uplink, and a client's private state."""

    values: Vector


@dataclass(frozen=True)
class OwnWork:
    """FedAvg of the results of LocalWork. The model that fedray loads for it has one tiny LoRA and never runs."""

    workload: str
    lora: LoraSection

    @property
    def averages(self) -> Averages:
        return "uniform"

    def attach(self, model: nn.Module) -> Adapter:
        return attach_lora(model, self.lora)

    def init_server(self, initial: Initial, clients: Sequence[Client]) -> Numbers:
        return Numbers(local_work(self.workload).initial())

    def init_client(self, initial: Initial, client: Client) -> Numbers:
        return Numbers(np.zeros(local_work(self.workload).workload.state, np.float32))

    def configure_train(self, server: Numbers, cohort: Sequence[Client]) -> Broadcast[Numbers]:
        return Broadcast(server, [client.id for client in cohort])

    def train_client(
        self, adapter: Adapter, client_state: Numbers, downlink: Numbers, local: Local
    ) -> tuple[Numbers, Numbers]:
        work = local_work(self.workload)
        if isinstance(local, LocalTrainer):  # not in the dry run of a round on shapes, before any actor starts
            work.workload.kill_once(local.server_round)
        update = work.train(local.client.index, local.server_round, downlink.values)
        return Numbers(update), Numbers(client_state.values + np.float32(1))

    def aggregate_train(self, server: Numbers, updates: Sequence[Uploaded[Numbers]]) -> tuple[Numbers, Metrics]:
        (update,) = updates  # the mean of all
        return update.payload, {"value": float(update.payload.values[0])}


@dataclass(frozen=True)
class OneByOne(OwnWork):
    """Like OwnWork, but the server receives every update and computes the mean itself."""

    def aggregate_train(self, server: Numbers, updates: Sequence[Update[Numbers]]) -> tuple[Numbers, Metrics]:
        total = np.zeros_like(server.values)
        for update in updates:
            total += update.payload.values
        mean = total / np.float32(len(updates))
        return Numbers(mean), {"value": float(mean[0])}


@state_type("benchmarks.WithState")
@dataclass(frozen=True)
class WithState:
    """FedAvg's client state, and further private state."""

    own: ClientState
    private: Vector


@dataclass(frozen=True)
class StatefulFedAvg:
    """FedAvg whose clients also keep `state` private numbers and change them in every task."""

    state: int
    lora: LoraSection
    reft: ReftSection

    @property
    def averages(self) -> Averages:
        return self.fedavg.averages

    @cached_property
    def fedavg(self) -> FedAvg:
        return FedAvg(adapter=LoraKind(lora=self.lora))

    def attach(self, model: nn.Module) -> Adapter:
        return self.fedavg.attach(model)

    def init_server(self, initial: Initial, clients: Sequence[Client]) -> Server:
        return self.fedavg.init_server(initial, clients)

    def init_client(self, initial: Initial, client: Client) -> WithState:
        return WithState(self.fedavg.init_client(initial, client), np.zeros(self.state, np.float32))

    def configure_train(self, server: Server, cohort: Sequence[Client]) -> Sequence[Broadcast[GlobalAdapter]]:
        return self.fedavg.configure_train(server, cohort)

    def train_client(
        self, adapter: Adapter, client_state: WithState, downlink: GlobalAdapter, local: Local
    ) -> tuple[GlobalAdapter, WithState]:
        payload, own = self.fedavg.train_client(adapter, client_state.own, downlink, local)
        return payload, WithState(own, client_state.private + np.float32(1))

    def aggregate_train(self, server: Server, updates: Sequence[Uploaded[GlobalAdapter]]) -> tuple[Server, Metrics]:
        return self.fedavg.aggregate_train(server, updates)
