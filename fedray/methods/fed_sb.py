"""Fed-SB (Singhal et al., TMLR 2026, arXiv 2502.15436): between fixed frames B and A only a core R [r, r] is trained.

    y = W0 x + B R A x,      R ← Σ_k w_k R_k

Because B and A are common, the mean of the cores is the mean of the products B R_k A: averaging is exact, and a client
sends r² numbers per target. The frames are those of the first full step (LoRA-SB, arXiv 2411.19557): in round 0 each
client sends the gradient g_k of its loss with respect to every target's weight, in rank r, instead of training, and
with U Σ Vᵀ the SVD of −Σ_k w_k g_k in rank r

    B = U,   A = Vᵀ,   R_0 = η Σ / σ_1.

A client receives the frames once and keeps them. Departures: the official code computes one gradient on all clients'
pooled raw data and takes its sign, which has no low-rank sum; with `init: random`, orthonormal frames follow from the
seed, and no round is spent on them. Tiers hold the first r_k components, so the leading block of R.

The paper's settings: ranks 120, 160 and 200 on seven modules, gradients of 50 to 170 examples (after its code).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from fedray.adapters.adapter import Adapter
from fedray.adapters.draws import draw_frames
from fedray.adapters.kind import AdapterKind
from fedray.adapters.kinds.core import CORE
from fedray.adapters.layout import Layout
from fedray.aggregation.frames import frame
from fedray.aggregation.low_rank import LowRank, concatenate, truncate
from fedray.errors import ConfigError
from fedray.methods import fedavg
from fedray.methods.bases.shared_adapter import ClientState, GlobalAdapter
from fedray.methods.parts.capacity import gather, own_layout
from fedray.methods.parts.factors import Delta, join, split
from fedray.methods.protocol import Averages, Broadcast, Initial, Local, Metrics, needs
from fedray.types import Client, ClientId, Vector, state_type


@state_type("fed_sb.Server")
@dataclass(frozen=True)
class Server:
    """Server state: FedAvg's of R and the head; the frames (None before the first gradients, and where they follow from
    the seed), with their layout; the clients that have them."""

    common: fedavg.Server
    seed: int
    layout: Layout
    frames: Vector | None
    informed: tuple[ClientId, ...]


@dataclass(frozen=True)
class Core(GlobalAdapter):
    """Downlink: R, the head, and the frames for a client that does not have them."""

    frames: Vector | None


@dataclass(frozen=True)
class Gradient:
    """Uplink of a client without frames: −g_k of every target, in rank r_k."""

    descent: Delta


@state_type("fed_sb.Client")
@dataclass(frozen=True)
class Framed(ClientState):
    """Client state, with the frames that the client has received."""

    frames: Vector | None = None


@dataclass(frozen=True)
class FedSb(fedavg.FedAvg):
    """FedAvg of a core between common frames.

    Attributes:
        init: `gradient` (the paper; round 0 trains nothing) or `random` (R_0 = 0).
        step: η, the spectral norm of every weight's first change; the paper's step, of signs, has another norm.
        init_examples: training examples of a client whose gradient is taken, at most.
    """

    personalised: ClassVar[bool] = False
    adapter: AdapterKind = CORE
    init: Literal["gradient", "random"] = "gradient"
    step: Annotated[float, Field(gt=0)] = 0.01
    init_examples: Annotated[int, Field(ge=1)] = 128

    def __post_init__(self) -> None:
        if self.adapter.group != "core":
            raise ConfigError(f"fed_sb.adapter: {self.adapter.label} has no core between frames; use adapter: core")
        if self.mask != "none":
            raise ConfigError("fed_sb.mask: B does not travel, so no row can be left out; set mask: none")
        needs(self, "step", self.init == "gradient", "init: gradient")
        needs(self, "init_examples", self.init == "gradient", "init: gradient")

    @property
    def averages(self) -> Averages | None:
        return self.weights if self.init == "random" else None

    def init_server(self, initial: Initial, clients: Sequence[Client]) -> Any:
        return Server(super().init_server(initial, clients), initial.seed, initial.layout("frames"), None, ())

    def configure_train(self, server: Any, cohort: Sequence[Client]) -> list[Broadcast[Any]]:
        capacity = {client.id: client.capacity for client in cohort}
        sent = []
        for down in super().configure_train(server.common, cohort):
            own, informed = own_layout(server.layout, capacity[down.clients[0]]), set(server.informed)
            frames = None if server.frames is None else gather(server.layout, own, server.frames)
            for new, ids in ((None, informed.intersection(down.clients)), (frames, {*down.clients} - informed)):
                sent += [Broadcast(Core(**vars(down.payload), frames=new), sorted(ids))] if ids else []
        return sent

    def train_client(self, adapter: Adapter, client_state: Any, downlink: Any, local: Local) -> Any:
        if self.init == "random":
            return super().train_client(adapter, client_state, downlink, local)
        frames = getattr(client_state, "frames", None) if downlink.frames is None else downlink.frames
        if frames is None:
            found = local.weight_gradients(adapter.layout("frames").slots[0].shape[0], self.init_examples)
            return Gradient(tuple(LowRank(-found[path].B, found[path].A) for path in adapter.targets)), client_state
        adapter.load("frames", frames)
        core, after = super().train_client(adapter, client_state, downlink, local)
        return core, Framed(after.head, frames)

    def aggregate_train(self, server: Any, updates: Sequence[Any]) -> tuple[Any, Metrics]:
        if self.init == "gradient" and server.frames is None:
            return (self._framed(server, updates) if updates else server), {}
        common, metrics = super().aggregate_train(server.common, updates)
        ids = [] if server.frames is None else [update.client.id for update in updates]
        return replace(server, common=common, informed=tuple(sorted({*server.informed, *ids}))), metrics

    def _framed(self, server: Server, updates: Sequence[Any]) -> Server:
        """Return the server with the frames and R_0 of the mean gradient."""
        counts = self.counts(updates)
        frames, cores = [], []
        draws = split(server.layout, draw_frames(server.layout, server.seed))
        for draw, *sent in zip(draws, *(update.payload.descent for update in updates), strict=True):
            mean = concatenate([(count / sum(counts), x) for count, x in zip(counts, sent, strict=True)])
            found, values = frame(truncate(mean, draw.rank), draw)
            frames.append(found)
            cores.append(np.diag(self.step * values / (values.max() or 1)).reshape(-1))
        shared = replace(server.common.shared, adapter=np.concatenate(cores).astype(np.float32))
        return replace(server, common=replace(server.common, shared=shared), frames=join(frames))


ENTRY = FedSb
