"""Custom methods in which hostile clients send the negative of their updates."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedray.methods.fedavg import FedAvg
from fedray.methods.fedreft import FedReft


def flipped(uplink: Any) -> Any:
    """Return the payload with every array negated."""
    values: Mapping[str, Any] = vars(uplink)
    return replace(uplink, **{name: -array for name, array in values.items() if array is not None})


@dataclass(frozen=True)
class FlippedFedReft(FedReft):
    """The first `hostile` clients by id flip the sign of their updates."""

    hostile: int = 2

    def train_client(self, adapter: Any, client_state: Any, downlink: Any, local: Any) -> Any:
        uplink, own = super().train_client(adapter, client_state, downlink, local)
        return (flipped(uplink) if local.client.index < self.hostile else uplink), own


@dataclass(frozen=True)
class FlippedFedAvg(FedAvg):
    """The first `hostile` clients by id flip the sign of their updates."""

    hostile: int = 2

    def train_client(self, adapter: Any, client_state: Any, downlink: Any, local: Any) -> Any:
        uplink, own = super().train_client(adapter, client_state, downlink, local)
        return (flipped(uplink) if local.client.index < self.hostile else uplink), own
