"""FedAvg (McMahan et al., 2017, arXiv 1602.05629) on LoRA (= FedIT, arXiv 2305.05644), on LoReFT (FedReFT's ablation
baseline), or on the whole model (full fine-tuning, the denominator of every ratio).

Every client of the cohort starts from the server's adapter θ, trains it, and sends it back; the server takes the mean,

    θ ← Σ_k w_k θ_k,   w_k = n_k / Σ n  or  1/K,

or moves towards it with a server optimizer (FedOpt: FedAvgM, FedAdagrad, FedAdam, FedYogi). Averaged rotations of
LoReFT are retracted to the Stiefel manifold (polar factor). Where tiers hold parts of the adapter, a value is averaged
over the clients that hold it. The factors of LoRA are averaged separately: the mean of the products B_k A_k differs
from the product of the means by Σ_k w_k (B_k − B̄)(A_k − Ā).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from fedray.adapters.adapter import Adapter
from fedray.adapters.layout import Layout
from fedray.adapters.rotations import retract_rotations
from fedray.aggregation.server_optimizer import ServerOptimizerOption, State, step_where_held
from fedray.aggregation.server_optimizers.sgd import TAKE_THE_MEAN
from fedray.errors import ConfigError
from fedray.methods.bases.shared_adapter import ClientState, GlobalAdapter, SharedAdapter
from fedray.methods.bases.shared_adapter import Server as SharedServer
from fedray.methods.parts.capacity import Places, held_by_any, held_mean, own_layout
from fedray.methods.parts.masking import Bits, keep_important, masked_places
from fedray.methods.protocol import Averages, Initial, Local, Metrics, Uploaded
from fedray.types import Client, state_type


@state_type("fedavg.Server", "fedray.methods.fedavg.Server")
@dataclass(frozen=True)
class Server(SharedServer):
    """Server state.

    Attributes:
        adapter_optimizer: state of the server optimizer for the adapter's values.
        head_optimizer: and for the head's.
    """

    adapter_optimizer: State = field(default_factory=dict)
    head_optimizer: State = field(default_factory=dict)


@dataclass(frozen=True)
class MaskedAdapter(GlobalAdapter):
    """Uplink of a masked client: `adapter` has only some rows of B.

    Attributes:
        rows: which, as a bitset; None: all.
    """

    rows: Bits | None


@dataclass(frozen=True)
class FedAvg(SharedAdapter):
    """One adapter for all clients, the mean of theirs.

    Attributes:
        adapter: what is trained and averaged; `full` is the whole model.
        weights: w_k: `examples` (n_k, the paper) or `uniform`.
        server_optimizer: how the server moves to the mean: `sgd` with lr 1 takes it; `momentum` is FedAvgM, `adagrad`,
            `adam` and `yogi` are FedAdagrad, FedAdam and FedYogi, each a mapping with `name`, `lr` and its own fields.
        mask: FedHFT's masks: a client whose tier has a `mask_ratio` sends only that share of B's rows, chosen by this
            importance, and a row is averaged over the clients that sent it. `none`: all clients send all rows.
    """

    server_optimizer: ServerOptimizerOption = TAKE_THE_MEAN
    mask: Literal["none", "fisher", "energy"] = "none"

    def __post_init__(self) -> None:
        if self.mask != "none":
            self.requires_lora("whose rows could be masked")
            if not self.shared.startswith("lora") or self.shared == "lora.A":
                raise ConfigError(f"{self.name}.mask: B does not travel, so no row can be left out; set mask: none")

    @property
    def averages(self) -> Averages | None:
        return self.weights if self.mask == "none" else None  # clients with other rows have no common shape

    def init_server(self, initial: Initial, clients: Sequence[Client]) -> Server:
        start = super().init_server(initial, clients)
        head = () if start.shared.head is None else start.shared.head
        optimizer = self.server_optimizer
        return Server(start.layout, start.shared, optimizer.init(start.layout.size), optimizer.init(len(head)))

    def read(self, adapter: Adapter, local: Local) -> tuple[GlobalAdapter, ClientState]:
        uplink, state = super().read(adapter, local)
        if self.mask == "none":
            return uplink, state
        sent, rows = keep_important(adapter, adapter.layout(self.shared), uplink.adapter, self.mask, local)
        return MaskedAdapter(sent, uplink.head, rows), state

    def aggregate_train(self, server: Server, updates: Sequence[Uploaded[GlobalAdapter]]) -> tuple[Server, Metrics]:
        if not updates:
            return server, {}
        layout, old, counts = server.layout, server.shared, self.counts(updates)
        held = [self._places(layout, update) for update in updates]
        sent = [update.payload.adapter for update in updates]
        mean = held_mean(old.adapter, list(zip(held, sent, strict=True)), counts)
        adapter, adapter_optimizer = step_where_held(
            self.server_optimizer, server.adapter_optimizer, old.adapter, mean, held_by_any(layout.size, held)
        )
        head_optimizer = server.head_optimizer
        head = self.mean_head(server, updates)
        if old.head is not None and head is not None:
            head, head_optimizer = step_where_held(self.server_optimizer, head_optimizer, old.head, head)
        shared = GlobalAdapter(retract_rotations(layout, adapter), head)
        return replace(server, shared=shared, adapter_optimizer=adapter_optimizer, head_optimizer=head_optimizer), {}

    def _places(self, layout: Layout, update: Uploaded[GlobalAdapter]) -> Places | None:
        """Return where the values that were sent lie in the shared vector; None: everywhere."""
        rows = update.payload.rows if isinstance(update.payload, MaskedAdapter) else None
        return masked_places(layout, own_layout(layout, update.capacity), rows)


ENTRY = FedAvg
