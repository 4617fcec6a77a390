"""FedALT: an individual LoRA, a frozen Rest-of-World LoRA and a mixer per token (arXiv 2503.11880).

Every target linear of client k computes y = W0 x + s α_L(x) B^L A^L x + s α_R(x) B^R A^R x with
(α_R, α_L) = softmax(G x). Unlike FedAvg, the aggregate never overwrites the individual LoRA: the driver sends
A_k^R, B_k^R = mean of the others' A_j^L, B_j^L (factors averaged separately, unweighted), the client trains L and G.

With `adapter: reft` the two branches are LoReFT interventions (FedReFT's, arXiv 2508.20295) instead of LoRAs: a token h
becomes h + α_L (Φ_L(h) − h) + α_R (Φ_R(h) − h), and the mean of the others' rotations is retracted where it is loaded.

Choices: an absent client counts with its latest update; a client that has never trained counts in no Rest-of-World
LoRA; if tiers have LoRAs of different rank, a component is averaged over the clients that have it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import numpy as np
from torch import nn

from fedray.adapters.adapter import Adapter
from fedray.adapters.draws import draw_mixer
from fedray.adapters.kind import AdapterKind
from fedray.adapters.kinds.lora import LORA
from fedray.adapters.layout import Layout
from fedray.aggregation.rule import RULES, Rule, rule_among
from fedray.config import Head
from fedray.errors import ConfigError
from fedray.methods.parts import heads
from fedray.methods.parts.all_but_me import all_but_me
from fedray.methods.parts.capacity import gather, in_place, own_layout
from fedray.methods.parts.masking import Bits, keep_important, masked_places
from fedray.methods.protocol import Initial, Local, Metrics, Update, needs
from fedray.types import Client, ClientId, Vector, state_type


@state_type("fedalt.Server", "fedray.methods.fedalt.Server")
@dataclass(frozen=True)
class Server:
    """Server state.

    Attributes:
        layout: of the common adapter.
        own: layout of what each client holds of it.
        latest: the individual adapter (A_j^L, B_j^L) of every client that has trained, as it was sent.
        head: the head, if it is shared.
        rows: which rows of B_j^L a masked client sent.
    """

    layout: Layout
    own: Mapping[ClientId, Layout]
    latest: Mapping[ClientId, Vector]
    head: Vector | None
    rows: Mapping[ClientId, Bits] = field(default_factory=dict)


@dataclass(frozen=True)
class RestOfWorld:
    """Downlink.

    Attributes:
        rest: (A_k^R, B_k^R), or None while no other client has trained (it is zero then).
        head: the head, if it is shared.
    """

    rest: Vector | None
    head: Vector | None


@dataclass(frozen=True)
class Individual:
    """Uplink.

    Attributes:
        lora: the individual adapter, of whichever kind.
        head: the head, if it is shared.
        rows: which rows of B a masked LoRA has, as a bitset; None: all.
    """

    lora: Vector
    head: Vector | None
    rows: Bits | None = None


@state_type("fedalt.Client", "fedray.methods.fedalt.Own")
@dataclass(frozen=True)
class ClientState:
    """Client state.

    Attributes:
        lora: the individual adapter, of whichever kind.
        mixer: G; None unless it is adaptive.
        head: the head, if it is private.
    """

    lora: Vector
    mixer: Vector | None
    head: Vector | None


@dataclass(frozen=True)
class FedAlt:
    """An individual adapter beside a frozen one of all others.

    Attributes:
        rest: rule that makes the Rest-of-World adapter of the others' values.
        trim: share that `trimmed_mean` leaves out at each end.
        mixer: `adaptive` (G trained), `fixed` (`alpha` on L, 1 − alpha on R), `none` (both weights 1).
        alpha: weight of L under `fixed`.
        adapter: of both branches: `lora` (the paper) or `reft`.
        a_init: `independent` (the authors' code, and the default for LoRA: every client draws its own A^L and G) or
            `common` (one draw for all; the average of products stays close to the product of averages). The default for
            LoReFT, since the mean of independent rotations has lost most of their length.
        mask: FedHFT's masks: a client whose tier has a `mask_ratio` sends only that share of B's rows, chosen by this
            importance, and keeps all of them; a row of others is made of the clients that sent it.
    """

    head: Head = "shared"
    adapter: AdapterKind = LORA
    rest: Annotated[str | Rule, rule_among("mean", "geometric_median", "trimmed_mean")] = "mean"
    trim: float = 0.2
    mixer: Literal["adaptive", "fixed", "none"] = "adaptive"
    alpha: float = 0.5
    a_init: Literal["independent", "common"] | None = None
    mask: Literal["none", "fisher", "energy"] = "none"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"fedalt.alpha: expected a weight in [0, 1], got {self.alpha}")
        if not 0 <= self.trim < 0.5:
            raise ConfigError(f"fedalt.trim: expected a share in [0, 0.5), got {self.trim}")
        needs(self, "alpha", self.mixer == "fixed", "mixer: fixed")
        needs(self, "trim", self.rest == "trimmed_mean", "rest: trimmed_mean")
        needs(self, "mask", self.adapter.group == "lora", "adapter: lora, whose rows of B are masked")

    @property
    def independent(self) -> bool:
        """Whether every client draws its own first values."""
        return self.a_init == "independent" or (self.a_init is None and self.adapter.group == "lora")

    def attach(self, model: nn.Module) -> Adapter:
        adapter = self.adapter.attach_mixed(model, self.alpha if self.mixer == "fixed" else self.mixer)
        groups = (self.adapter.group, "mixer") if self.mixer == "adaptive" else (self.adapter.group,)
        adapter.set_trainable(*heads.trainable(self.head, adapter, *groups))
        return adapter

    def init_server(self, initial: Initial, clients: Sequence[Client]) -> Server:
        layout = initial.layouts[self.adapter.group]
        own = {client.id: own_layout(layout, client.capacity) for client in clients}
        return Server(layout, own, {}, heads.initial(self.head, initial.head())[0])

    def admit(self, server: Server, client: Client) -> Server:
        """Return the server with a client that arrives after the run."""
        return replace(server, own={**server.own, client.id: own_layout(server.layout, client.capacity)})

    def init_client(self, initial: Initial, client: Client) -> ClientState:
        own, mixer = initial.vectors[self.adapter.group], initial.vectors.get("mixer")
        if self.independent:
            own = self.adapter.draw(initial.layouts[self.adapter.group], initial.seed, "init", client.id)
            if mixer is not None:
                mixer = draw_mixer(initial.layouts["mixer"], initial.seed, "init", client.id)
        return ClientState(own, mixer, heads.initial(self.head, initial.head())[1])

    def configure_train(self, server: Server, cohort: Sequence[Client]) -> Mapping[ClientId, RestOfWorld]:
        layout, own, rows = server.layout, server.own, server.rows
        latest = {
            id: in_place(layout.size, masked_places(layout, own[id], rows.get(id)), sent)
            for id, sent in server.latest.items()
        }
        rest = all_but_me(latest, [client.id for client in cohort], self._rule())
        return {client.id: RestOfWorld(self._held(server, client, rest[client.id]), server.head) for client in cohort}

    def _rule(self) -> Rule:
        if isinstance(self.rest, Rule):
            return self.rest
        rule: Rule = RULES.parse({"name": self.rest, "trim": self.trim})
        return rule

    def _held(self, server: Server, client: Client, rest: Vector | None) -> Vector | None:
        """Return what the client can hold of its rest of world; where no other client holds a value, one that does
        nothing."""
        if rest is None:
            return None
        own = server.own[client.id]
        held = gather(server.layout, own, rest)
        return np.where(np.isnan(held), self.adapter.idle(own), held) if np.isnan(held).any() else held

    def train_client(
        self, adapter: Adapter, client_state: ClientState, downlink: RestOfWorld, local: Local
    ) -> tuple[Individual, ClientState]:
        group = self.adapter.group
        adapter.load(group, client_state.lora)
        if client_state.mixer is not None:
            adapter.load("mixer", client_state.mixer)
        adapter.load("rest", self.adapter.idle(adapter.layout("rest")) if downlink.rest is None else downlink.rest)
        heads.load(self.head, adapter, downlink.head, client_state.head)
        local.train()
        head_up, head_own = heads.read(self.head, adapter)
        own = adapter.read(group)
        mixer = None if client_state.mixer is None else adapter.read("mixer")
        sent, rows = own, None
        if self.mask != "none":
            sent, rows = keep_important(adapter, adapter.layout(group), own, self.mask, local)
        return Individual(sent, head_up, rows), ClientState(own, mixer, head_own)

    def aggregate_train(self, server: Server, updates: Sequence[Update[Individual]]) -> tuple[Server, Metrics]:
        latest = {**server.latest, **{update.client.id: update.payload.lora for update in updates}}
        masked = {update.client.id: update.payload.rows for update in updates if update.payload.rows is not None}
        sent = [update.payload.head for update in updates]
        head = heads.average(server.head, sent, [update.num_examples for update in updates])
        return replace(server, latest=latest, head=head, rows={**server.rows, **masked}), {}


ENTRY = FedAlt
