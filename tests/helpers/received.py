"""What a method's clients receive."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedray.federation.tasks import downlinks_of
from fedray.methods.protocol import AnyMethod
from fedray.types import Client, ClientId


def received(method: AnyMethod, server: Any, clients: Sequence[Client]) -> Mapping[ClientId, Any]:
    """Return each client's payload, as the method's `configure_train` sends it."""
    downlinks = downlinks_of(method.configure_train(server, clients), clients)
    return {client.id: downlinks[client.id].payload for client in clients}
