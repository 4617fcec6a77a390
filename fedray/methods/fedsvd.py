"""FedSVD (Lee et al., NeurIPS 2025, arXiv 2505.12805): B is trained, and the server makes the rows of A orthonormal.

In every round the server takes the mean of B, which is the mean of the products, since A is common, and factors that
product anew:

    U Σ Vᵀ = SVD(Σ_k w_k B_k A),   A ← Vᵀ,   B ← U Σ

Clients receive both factors, train B, and send B. A first round has A_0, the common draw, and B = 0, as in the released
code; its rows become orthonormal in the first aggregation. The rows of A always span what those of A_0 span: under
plain SGD, every basis of that span with orthonormal rows gives the same products; under Adam, the basis matters.

Departures: the released code takes the SVD of the dense product, whose rows of Vᵀ for a singular value of 0 can be any
orthonormal ones. Here the SVD is that of an r × r matrix, from Aᵀ = Q R and B̄ Rᵀ, and those rows stay in the span of
A_0, too; B is 0 there, and can be trained. Tiers of smaller rank, which the code does not have, hold the components
with the largest singular values, and a component is averaged over the clients that hold it. The code freezes the head
(`head: frozen_random`). What the paper's text says on these points was not checked.

The paper's settings, after its code: RoBERTa-large, query and value, rank 8, alpha 8, dropout 0.05, SGD with rate 0.5,
10 local steps of 2 × 64 examples, 100 rounds of 3 out of 6 clients. The paper's subject is DP-SGD on the clients, which
is not part of this method.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from fedray.adapters.adapter import Adapter
from fedray.aggregation.low_rank import LowRank
from fedray.errors import ConfigError
from fedray.methods.bases.shared_adapter import ClientState, GlobalAdapter, Server, SharedAdapter
from fedray.methods.parts import heads
from fedray.methods.parts.capacity import held_mean, own_layout, places
from fedray.methods.parts.factors import join, split
from fedray.methods.protocol import Averages, Local, Metrics, Uploaded


@dataclass(frozen=True)
class FedSvd(SharedAdapter):
    """FedAvg of B, with an A whose rows the server makes orthonormal in every round.

    Attributes:
        adapter: the LoRA of which B is trained.
        weights: w_k: `examples` (n_k, the released code) or `uniform`.
    """

    def __post_init__(self) -> None:
        self.requires_lora("of which FedSVD trains B")

    @property
    def averages(self) -> Averages:
        return self.weights

    def attach(self, model: nn.Module) -> Adapter:
        adapter = self.adapter.attach(model)
        for slot in adapter.layout("lora.A").slots:
            rank, d_in = slot.shape
            if rank > d_in:
                raise ConfigError(
                    f"lora.rank: {rank}, but {slot.module!r} has {d_in} inputs, and FedSVD needs {rank} orthonormal "
                    "rows of that length; lower lora.rank"
                )
        adapter.set_trainable(*heads.trainable(self.effective_head, adapter, "lora.B"))
        return adapter

    def read(self, adapter: Adapter, local: Local) -> tuple[GlobalAdapter, ClientState]:
        uplink, state = super().read(adapter, local)
        return replace(uplink, adapter=adapter.read("lora.B")), state

    def aggregate_train(self, server: Server, updates: Sequence[Uploaded[GlobalAdapter]]) -> tuple[Server, Metrics]:
        if not updates:
            return server, {}
        layout, before = server.layout.part("B"), server.shared.adapter
        sent = [(places(layout, own_layout(layout, update.capacity)), update.payload.adapter) for update in updates]
        mean = held_mean(before[server.layout.mask({"B"})], sent, self.counts(updates))
        adapter = join(
            [
                orthonormal(LowRank(B=b, A=old.A))
                for old, (_, b) in zip(split(server.layout, before), layout.items(mean), strict=True)
            ]
        )
        return replace(server, shared=GlobalAdapter(adapter, self.mean_head(server, updates))), {}


def orthonormal(x: LowRank) -> LowRank:
    """Return the same matrix as U Σ and Vᵀ, largest singular value first, where the rows of Vᵀ span those of A.

    Args:
        x: B [d_out, r] and A [r, d_in] with r <= d_in.
    """
    q, r = np.linalg.qr(x.A.T.astype(np.float64))
    b = x.B @ r.T  # B A = b Qᵀ
    _, _, vt = np.linalg.svd(np.linalg.qr(b, mode="r"))  # [r, r], even if d_out < r
    return LowRank(B=(b @ vt.T).astype(np.float32), A=(vt @ q.T).astype(np.float32))


ENTRY = FedSvd
