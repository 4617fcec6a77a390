"""FedReFT: federated representation fine-tuning with All-But-Me aggregation (arXiv 2508.20295).

Client k keeps its own intervention φ_k. The driver builds from all other clients' latest φ_j the aggregate
φ_{-k} = Agg({φ_j : j ≠ k}), and the client takes over a part λ_k of it before it trains again:
φ_k ← (1 − λ_k) φ_k + λ_k φ_{-k}, with the rotations retracted to the Stiefel manifold.

Choices where the paper's text is open: an absent client counts with its latest update; all clients start from the
identical φ; λ_k is the candidate with the lowest loss on the client's validation split (the paper balances local
against global per client). Beyond the paper: `align: procrustes` removes LoReFT's gauge freedom (QR, QW, Qb) first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from torch import nn

from fedray.adapters.adapter import Adapter
from fedray.adapters.layout import Layout, Part
from fedray.adapters.reft import attach_reft
from fedray.aggregation.geometric_median import Weiszfeld
from fedray.aggregation.rule import RULES, Rule, rule_among
from fedray.aggregation.stiefel import procrustes_rotation
from fedray.config import Head, ReftSection
from fedray.errors import ConfigError, TrainingError
from fedray.methods.parts import heads
from fedray.methods.parts.all_but_me import all_but_me
from fedray.methods.parts.capacity import gather, own_layout, scatter
from fedray.methods.protocol import Initial, Local, Metrics, Update, needs
from fedray.types import Client, ClientId, Vector, state_type


@state_type("fedreft.Server", "fedray.methods.fedreft.Server")
@dataclass(frozen=True)
class Server:
    """Server state.

    Attributes:
        layout: of the shared part of φ.
        own: layout of what each client holds of that part.
        initial: the φ from which all clients start.
        latest: every φ_j that the driver holds, in the client's own layout.
        head: the head, if it is shared.
    """

    layout: Layout
    own: Mapping[ClientId, Layout]
    initial: Vector
    latest: Mapping[ClientId, Vector]
    head: Vector | None


@dataclass(frozen=True)
class AllButMe:
    """Downlink.

    Attributes:
        others: the shared part of φ_{-k}, NaN where no other client holds a layer's intervention; None while no other
            client has trained.
        head: the head, if it is shared.
    """

    others: Vector | None
    head: Vector | None


@dataclass(frozen=True)
class SharedPart:
    """Uplink.

    Attributes:
        phi: the part of φ_k that `share` names.
        head: the head, if it is shared.
    """

    phi: Vector
    head: Vector | None


@state_type("fedreft.Client", "fedray.methods.fedreft.Own")
@dataclass(frozen=True)
class ClientState:
    """Client state.

    Attributes:
        phi: the whole φ_k.
        head: the head, if it is private.
    """

    phi: Vector
    head: Vector | None


@dataclass(frozen=True)
class FedReft:
    """Interventions of each client's own, moved towards the aggregate of all others.

    Attributes:
        aggregate: the rule Agg.
        granularity: one aggregate over the whole φ (`all`), or one per layer.
        mixing: `adaptive` chooses λ_k among `candidates`, `fixed` uses `lam`.
        lam: λ; 0 ignores the others, 1 replaces the shared part by theirs.
        candidates: values of λ_k that are compared.
        share: `full` (R, W, b), `rotation` (R), `source` (W, b); the rest stays local.
        align: `procrustes` rotates the others' φ to the client's before they are aggregated.
        smoothing: ε of the geometric median, relative to the points' scatter.
        tolerance: stopping rule of the geometric median.
        max_iterations: cap of its iterations.
    """

    reft: ReftSection
    head: Head = "shared"
    aggregate: Annotated[str | Rule, rule_among("geometric_median", "mean")] = "geometric_median"
    granularity: Literal["all", "layer"] = "all"
    mixing: Literal["adaptive", "fixed"] = "adaptive"
    lam: float = 0.5
    candidates: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    share: Literal["full", "rotation", "source"] = "full"
    align: Literal["none", "procrustes"] = "none"
    smoothing: float = Weiszfeld.smoothing
    tolerance: float = Weiszfeld.tolerance
    max_iterations: int = Weiszfeld.max_iterations

    def __post_init__(self) -> None:
        outside = [lam for lam in (self.lam, *self.candidates) if not 0 <= lam <= 1]
        if outside or not self.candidates:
            raise ConfigError(f"fedreft: lam and candidates must lie in [0, 1] and not be empty, got {outside}")
        needs(self, "lam", self.mixing == "fixed", "mixing: fixed")
        needs(self, "candidates", self.mixing == "adaptive", "mixing: adaptive")
        Weiszfeld(self.smoothing, self.tolerance, self.max_iterations)  # checks the numbers

    def attach(self, model: nn.Module) -> Adapter:
        adapter = attach_reft(model, self.reft)
        adapter.set_trainable(*heads.trainable(self.head, adapter, "reft"))
        return adapter

    def init_server(self, initial: Initial, clients: Sequence[Client]) -> Server:
        layout = self._shared_layout(initial.layouts["reft"])
        own = {client.id: own_layout(layout, client.capacity) for client in clients}
        if self.align == "procrustes" and any(part != layout for part in own.values()):
            raise ConfigError("fedreft.align: `procrustes` needs every tier to edit the same layers (reft_layers)")
        phi = initial.vectors["reft"][self._shared(initial.layouts["reft"])]
        return Server(layout, own, phi, {}, heads.initial(self.head, initial.head())[0])

    def admit(self, server: Server, client: Client) -> Server:
        """Return the server with a client that arrives after the run."""
        return replace(server, own={**server.own, client.id: own_layout(server.layout, client.capacity)})

    def init_client(self, initial: Initial, client: Client) -> ClientState:
        return ClientState(initial.vectors["reft"], heads.initial(self.head, initial.head())[1])

    def configure_train(self, server: Server, cohort: Sequence[Client]) -> Mapping[ClientId, AllButMe]:
        wanted = [client.id for client in cohort]
        if self.align == "procrustes":
            others = {id: self._aligned(server, id) for id in wanted}
        else:
            latest = {id: scatter(server.layout, server.own[id], phi) for id, phi in server.latest.items()}
            others = all_but_me(latest, wanted, self._rule(), self._groups(server.layout))
        return {id: AllButMe(self._held(server, id, others[id]), server.head) for id in wanted}

    def _held(self, server: Server, id: ClientId, others: Vector | None) -> Vector | None:
        return None if others is None else gather(server.layout, server.own[id], others)

    def train_client(
        self, adapter: Adapter, client_state: ClientState, downlink: AllButMe, local: Local
    ) -> tuple[SharedPart, ClientState]:
        shared = self._shared(adapter.layout("reft"))
        heads.load(self.head, adapter, downlink.head, client_state.head)
        phi, lam = client_state.phi, 0.0
        if downlink.others is not None:
            lam = self._choose_lambda(adapter, phi, downlink.others, shared, local)
            phi = mix(phi, downlink.others, shared, lam)
        adapter.load("reft", phi)
        local.record("lam", lam)
        local.train()
        head_up, head_own = heads.read(self.head, adapter)
        phi = adapter.read("reft")
        return SharedPart(phi[shared], head_up), ClientState(phi, head_own)

    def aggregate_train(self, server: Server, updates: Sequence[Update[SharedPart]]) -> tuple[Server, Metrics]:
        latest = {**server.latest, **{update.client.id: update.payload.phi for update in updates}}
        sent = [update.payload.head for update in updates]
        head = heads.average(server.head, sent, [update.num_examples for update in updates])
        return replace(server, latest=latest, head=head), {}

    def _choose_lambda(
        self, adapter: Adapter, phi: Vector, others: Vector, shared: npt.NDArray[np.bool_], local: Local
    ) -> float:
        """Return the candidate with the lowest validation loss, the smallest on ties.

        Raises:
            TrainingError: the client has no validation examples to choose by.
        """
        if self.mixing == "fixed":
            return self.lam
        losses = {}
        for lam in sorted(set(self.candidates)):
            adapter.load("reft", mix(phi, others, shared, lam))
            evaluation = local.evaluate("validation")
            if evaluation.num_examples == 0:
                raise TrainingError(
                    f"client {local.client.id!r} has no validation examples to choose λ by; raise "
                    "partition.validation_fraction, or set fedreft's mixing to fixed"
                )
            losses[lam] = evaluation.loss
        return min(losses, key=lambda lam: (losses[lam], lam))

    def _parts(self) -> set[Part]:
        rotation: set[Part] = {"R", "P"}
        source: set[Part] = {"W", "b"}
        return {"full": rotation | source, "rotation": rotation, "source": source}[self.share]

    def _shared(self, layout: Layout) -> npt.NDArray[np.bool_]:
        """Return which values of the whole φ are shared, [d]."""
        return layout.mask(self._parts())

    def _shared_layout(self, layout: Layout) -> Layout:
        return Layout(tuple(slot for slot in layout.slots if slot.part in self._parts()))

    def _groups(self, layout: Layout) -> list[slice]:
        """Return the ranges of a shared vector that are aggregated on their own."""
        if self.granularity == "all":
            return [slice(0, layout.size)]
        ranges, start = [], 0
        for _, slots in groupby(layout.slots, key=lambda slot: layer_of(slot.module)):
            size = sum(slot.size for slot in slots)
            ranges.append(slice(start, start + size))
            start += size
        return ranges

    def _rule(self) -> Rule:
        if isinstance(self.aggregate, Rule):
            return self.aggregate
        options = {name: getattr(self, name) for name in ("smoothing", "tolerance", "max_iterations")}
        rule: Rule = RULES.parse({"name": self.aggregate, **options})
        return rule

    def _aligned(self, server: Server, me: ClientId) -> Vector | None:
        """Return φ_{-k} after rotating every other φ_j to its best fit with φ_k, at first the initial φ."""
        ids = [id for id in sorted(server.latest) if id != me]
        if not ids:
            return None
        reference = server.latest.get(me, server.initial)
        aligned = {id: align(server.layout, server.latest[id], reference) for id in ids}
        return all_but_me(aligned, [me], self._rule(), self._groups(server.layout))[me]


def mix(phi: Vector, others: Vector, shared: npt.NDArray[np.bool_], lam: float) -> Vector:
    """Return (1 − λ) φ + λ φ_{-k} on the shared values that others hold, φ elsewhere; the adapter retracts R when it
    loads it. [d]"""
    mixed = phi.copy()
    mixed[shared] = np.where(np.isnan(others), phi[shared], (1 - lam) * phi[shared] + lam * others)
    return mixed


def layer_of(module: str) -> str:
    """Return the block's path: prefix and suffix of one block are one layer."""
    return module.rsplit(".", 1)[0]


def align(layout: Layout, phi: Vector, reference: Vector) -> Vector:
    """Return (QR, QW, Qb) with the orthogonal Q that fits each intervention best to the reference's. [d]"""
    aligned = phi.copy()
    for _, places in groupby(
        zip(layout.items(phi), layout.items(reference), layout.items(aligned), strict=True),
        key=lambda place: place[0][0].module,
    ):
        mine, theirs, out = zip(*[(a[1], b[1], c[1]) for a, b, c in places], strict=True)
        q = procrustes_rotation(_stack(mine), _stack(theirs))
        for source, target in zip(mine, out, strict=True):
            target[...] = q @ source
    return aligned


def _stack(parts: tuple[Vector, ...]) -> Vector:
    """Return R, W, b side by side: [r, 2d + 1]."""
    return np.concatenate([part.reshape(part.shape[0], -1) for part in parts], axis=1)


ENTRY = FedReft
