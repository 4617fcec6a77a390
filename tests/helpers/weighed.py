"""A method that uses every way to weigh two branches, and a core, with values of its own for every client."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedray import state_type
from fedray.adapters.lora import attach_lora
from fedray.config import LoraSection
from fedray.methods.protocol import Broadcast
from fedray.types import Vector


@state_type("weighed.Values")
@dataclass(frozen=True)
class Values:
    vectors: Mapping[str, Vector]


@dataclass(frozen=True)
class Weighed:
    """Every client draws all values, trains some groups, and sends everything and what its model makes of examples."""

    lora: LoraSection
    mixer: str = "none"
    trained: str = "lora"

    def attach(self, model):
        kind = {"core": True} if self.mixer == "core" else {"rest_rank": 2 * self.lora.rank, "mixer": self.mixer}
        adapter = attach_lora(model, self.lora, **kind)
        adapter.set_trainable(*self.trained.split())
        return adapter

    def init_server(self, initial, clients):
        return Values({})

    def init_client(self, initial, client):
        return Values({})

    def configure_train(self, server, cohort):
        return Broadcast(Values({}), [client.id for client in cohort])

    def train_client(self, adapter, client_state, downlink, local):
        for name in adapter.names:
            drawn = local.rng(name).normal(0, 0.3, adapter.layout(name).size).astype(np.float32)
            present = adapter.layout(name).mask({"present"})
            adapter.load(name, np.where(present, np.abs(drawn) > 0.2, drawn))
        before = {"features": local.features("train", [2, 0]).reshape(-1)}
        for path, gradient in local.weight_gradients(16, 3).items():
            before[path] = gradient.dense().reshape(-1)
        local.train()
        return Values({**before, **{name: adapter.read(name) for name in adapter.names}}), client_state

    def aggregate_train(self, server, updates):
        return server, {}
