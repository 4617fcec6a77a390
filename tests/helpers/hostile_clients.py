"""FedReFT with clients that send the opposite of what they learned."""

from dataclasses import dataclass, replace

from fedray.adapters.adapter import Adapter
from fedray.methods.fedreft import AllButMe, FedReft, Own, Server, SharedPart
from fedray.methods.protocol import Local

__all__ = ["Opposed", "Own", "Server", "SharedPart"]  # states are made of these


@dataclass(frozen=True)
class Opposed(FedReft):
    """hostile: how many clients, the first by id, send what they began with minus `strength` times what they learned.

    The negative of all of φ would do no harm: LoReFT's edit Rᵀ(Wh + b − Rh) is even in φ.
    """

    hostile: int = 0
    strength: float = 5.0

    def train_client(
        self, adapter: Adapter, client_state: Own, downlink: AllButMe, local: Local
    ) -> tuple[SharedPart, Own]:
        sent, own = super().train_client(adapter, client_state, downlink, local)
        if local.client.index >= self.hostile:
            return sent, own
        return replace(sent, phi=client_state.phi - self.strength * (own.phi - client_state.phi)), own
