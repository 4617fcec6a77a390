"""FedReFT whose clients learn one and the same thing, and some of whom send the opposite of what they learned."""

from dataclasses import dataclass, replace

import numpy as np

from fedray.adapters.adapter import Adapter
from fedray.methods.fedreft import AllButMe, ClientState, FedReft, SharedPart
from fedray.methods.protocol import Local
from fedray.randomness import keyed_rng
from fedray.training.trainer import LocalTrainer


@dataclass(frozen=True)
class Opposed(FedReft):
    """Training goes half of the way from what the client received to a target that all clients have, each with a little
    noise, and records how far from it the others' aggregate was.

    hostile: how many clients, the first by id, go five times as far in the opposite direction.
    """

    hostile: int = 0

    def train_client(
        self, adapter: Adapter, client_state: ClientState, downlink: AllButMe, local: Local
    ) -> tuple[SharedPart, ClientState]:
        sent, own = super().train_client(adapter, client_state, downlink, local)
        if not isinstance(local, LocalTrainer):  # the walk on shapes
            return sent, own
        target = keyed_rng(0, "target").standard_normal(own.phi.size).astype(np.float32)
        received = client_state.phi if downlink.others is None else downlink.others
        local.record("away", float(np.linalg.norm(received - target) / np.linalg.norm(target)))
        noise = keyed_rng(0, "noise", local.client.index, local.server_round).standard_normal(target.size)
        step = 0.5 * (target - received) + np.float32(0.05) * noise.astype(np.float32)
        learned = received + (-5 * step if local.client.index < self.hostile else step)
        return replace(sent, phi=learned), replace(own, phi=learned)
