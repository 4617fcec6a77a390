"""FedAvg (McMahan et al., 2017) on LoRA (= FedIT, arXiv 2305.05644), on LoReFT (FedReFT's ablation baseline), or on the
whole model (full fine-tuning, the denominator of every ratio).

Every client of the cohort starts from the server's adapter θ, trains it, and sends it back; the server takes the mean,

    θ ← Σ_k w_k θ_k,   w_k = n_k / Σ n  or  1/K,

or moves towards it with a server optimizer (FedOpt: FedAvgM, FedAdagrad, FedAdam, FedYogi). Averaged rotations of
LoReFT are retracted to the Stiefel manifold (polar factor). Where tiers hold parts of the adapter, a value is averaged
over the clients that hold it. The factors of LoRA are averaged separately: the mean of the products B_k A_k differs
from the product of the means by Σ_k w_k (B_k − B̄)(A_k − Ā).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from fedray.adapters.rotations import retract_rotations
from fedray.aggregation.server_optimizer import ServerOptimizerOption, State, step_where_held
from fedray.aggregation.server_optimizers.sgd import TAKE_THE_MEAN
from fedray.methods.parts import heads
from fedray.methods.parts.capacity import held_by_any, held_mean, own_layout, places
from fedray.methods.protocol import Averages, Initial, Metrics, Uploaded
from fedray.methods.shared_adapter import GlobalAdapter, SharedAdapter
from fedray.methods.shared_adapter import Server as SharedServer
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
class FedAvg(SharedAdapter):
    """One adapter for all clients, the mean of theirs.

    Attributes:
        adapter: what is trained and averaged; `full` is the whole model.
        weights: w_k: `examples` (n_k, the paper) or `uniform`.
        server_optimizer: how the server moves to the mean: `sgd` with lr 1 takes it; `momentum` is FedAvgM, `adagrad`,
            `adam` and `yogi` are FedAdagrad, FedAdam and FedYogi, each a mapping with `name`, `lr` and its own fields.
    """

    server_optimizer: ServerOptimizerOption = TAKE_THE_MEAN

    @property
    def averages(self) -> Averages | None:
        return self.weights

    def init_server(self, initial: Initial, clients: Sequence[Client]) -> Server:
        start = super().init_server(initial, clients)
        head = () if start.shared.head is None else start.shared.head
        optimizer = self.server_optimizer
        return Server(start.layout, start.shared, optimizer.init(start.layout.size), optimizer.init(len(head)))

    def aggregate_train(self, server: Server, updates: Sequence[Uploaded[GlobalAdapter]]) -> tuple[Server, Metrics]:
        if not updates:
            return server, {}
        layout, old, counts = server.layout, server.shared, self.counts(updates)
        held = [places(layout, own_layout(layout, update.capacity)) for update in updates]
        sent = [update.payload.adapter for update in updates]
        mean = held_mean(old.adapter, list(zip(held, sent, strict=True)), counts)
        adapter, adapter_optimizer = step_where_held(
            self.server_optimizer, server.adapter_optimizer, old.adapter, mean, held_by_any(layout.size, held)
        )
        head_optimizer = server.head_optimizer
        head = heads.average(old.head, [update.payload.head for update in updates], counts)
        if old.head is not None and head is not None:
            head, head_optimizer = step_where_held(self.server_optimizer, head_optimizer, old.head, head)
        shared = GlobalAdapter(retract_rotations(layout, adapter), head)
        return Server(layout, shared, adapter_optimizer, head_optimizer), {}


ENTRY = FedAvg
