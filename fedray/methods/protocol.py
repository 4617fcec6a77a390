"""What a method is: six functions and its hyperparameters, nothing to inherit from.

A method is a frozen dataclass whose fields are its hyperparameters. It may also declare the fields `lora`
(LoraSection), `reft` (ReftSection) and `head` (Head), which are then filled from the configuration's sections.
It sees flat vectors, the adapter, and `local`; never Ray, the training loop, or another client. A class attribute
`personalised` says whether clients end up with models of their own, where that does not follow from whether they keep
arrays.

A method whose server holds something of every client may define `admit(server, client)`, which returns the server's
state with a client that arrives after the run (`fedray personalise`).

Where a tier holds less (`lora_rank`, `reft_layers`), `attach`, `init_client` and `train_client` are called on a method
with that tier's sections, and the server's functions on the whole one: `fedray.methods.parts.capacity` maps between
them. A field `common_lora` (LoraSection) has the section `lora` without the tier's limit.

The smallest method, which federates how many examples the clients have and trains nothing:

    from dataclasses import dataclass

    from fedray import state_type
    from fedray.adapters.lora import attach_lora
    from fedray.config import LoraSection
    from fedray.methods.protocol import Broadcast

    @state_type("count.Nothing")
    @dataclass(frozen=True)
    class Nothing:
        pass

    @state_type("count.Total")
    @dataclass(frozen=True)
    class Total:
        examples: int

    @dataclass(frozen=True)
    class Count:
        lora: LoraSection

        def attach(self, model):
            return attach_lora(model, self.lora)

        def init_server(self, initial, clients):
            return Total(0)

        def init_client(self, initial, client):
            return Nothing()

        def configure_train(self, server, cohort):
            return Broadcast(Nothing(), [client.id for client in cohort])

        def train_client(self, adapter, client_state, downlink, local):
            return Total(local.client.num_examples), client_state

        def aggregate_train(self, server, updates):
            return Total(server.examples + sum(update.payload.examples for update in updates)), {}
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar, get_args

import numpy as np
import numpy.typing as npt
from torch import nn

from fedray.adapters.adapter import Adapter
from fedray.adapters.layout import Layout
from fedray.aggregation.low_rank import LowRank
from fedray.errors import ConfigError, choices
from fedray.training.steering import Steering
from fedray.types import Capacity, Client, ClientId, Evaluation, Split, Vector

Metrics = Mapping[str, float]
Averages = Literal["examples", "uniform"]
"""What clients count for in a weighted mean: their numbers of examples, or all the same.

A method of whose updates `aggregate_train` takes nothing but that mean, over all who sent the same shapes, should say
so with an attribute `averages`. Updates are then averaged on the actors, and do not travel one by one: see
`TierMean`.
"""

Payload = TypeVar("Payload")
ServerState = TypeVar("ServerState")
ClientState = TypeVar("ClientState")
Downlink = TypeVar("Downlink")
Uplink = TypeVar("Uplink")


@dataclass(frozen=True)
class Initial:
    """The common starting point, equal for every method of a comparison that has the same groups.

    Attributes:
        seed: the experiment's.
        layouts: what the vectors hold.
        vectors: initial value of each of the adapter's groups, drawn from the seed (frozen second branches are zero).
    """

    seed: int
    layouts: Mapping[str, Layout]
    vectors: Mapping[str, Vector]

    def layout(self, name: str) -> Layout:
        """Return the layout of a group, or of a part of one ("lora.B")."""
        group, _, part = name.partition(".")
        return self.layouts[group].part(part) if part else self.layouts[group]

    def vector(self, name: str) -> Vector:
        """Return the first values of a group, or of a part of one ("lora.B"), [layout(name).size]."""
        group, _, part = name.partition(".")
        vector = self.vectors[group]
        return vector[self.layouts[group].mask({part})] if part else vector

    def head(self) -> Vector | None:
        """Return the initial task head, or None where the model has none."""
        return self.vectors.get("head")


@dataclass(frozen=True)
class Broadcast(Generic[Payload]):
    """One payload for several clients: it is sent once per node, and counted once per client."""

    payload: Payload
    clients: Sequence[ClientId]


Downlinks = Broadcast[Payload] | Sequence[Broadcast[Payload]] | Mapping[ClientId, Payload]
"""What a round's clients receive: one payload for all of them, several for groups of them, or one for each."""


@dataclass(frozen=True)
class Update(Generic[Payload]):
    """The uplink of one client of the cohort.

    Attributes:
        client: who sent it.
        num_examples: training examples of the client (n_k).
        payload: what was sent. Its arrays are exactly what accounting counts as uplink.
    """

    client: Client
    num_examples: int
    payload: Payload

    @property
    def capacity(self) -> Capacity:
        """What the client's tier can hold."""
        return self.client.capacity

    @property
    def num_clients(self) -> int:
        """1."""
        return 1


@dataclass(frozen=True)
class TierMean(Generic[Payload]):
    """What all clients of a tier sent up, averaged where it arose, for a method that averages (`Averages`).

    Attributes:
        capacity: what the tier can hold.
        num_examples: sum over the clients.
        num_clients: number of clients.
        payload: their weighted mean.
    """

    tier: str
    capacity: Capacity
    num_examples: int
    num_clients: int
    payload: Payload


Uploaded = Update[Payload] | TierMean[Payload]
"""What a method's `aggregate_train` receives: one update per client, or one mean per tier."""


class Local(Protocol):
    """The client's side of a round: its data and its training loop."""

    @property
    def client(self) -> Client: ...
    @property
    def server_round(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def measures(self) -> bool:
        """Whether the test split is measured in this round. What is trained only for that can be left out otherwise."""
        ...

    def train(
        self,
        parts: Sequence[str] | None = None,
        *,
        epochs: float | None = None,
        steps: int | None = None,
        steering: Steering | None = None,
        phase: int | None = None,
        measure: bool = True,
        mean_gradient: bool = False,
    ) -> Mapping[str, Vector]:
        """Train on the client's shard, with everything loaded and a fresh optimizer. May be called several times in a
        round. The test split is measured right before the first call (`aggregated`); the row of the client has the
        steps of all calls and the mean of their losses.

        Args:
            parts: what trains in this call, by the names of `Adapter.set_trainable`, out of what attach() declared;
                default all of that. The rest has no gradient, does not decay, and does not count in the clipping norm.
            epochs: instead of `train.epochs`; `train.max_steps` holds all the same.
            steps: optimizer steps, instead of `train.epochs` and `train.max_steps`.
            steering: what is added to the gradient of every step, before clipping; not part of the reported loss.
            phase: keys the order of the examples and the dropout; default the call's index in the round. Two trainings
                of one phase see the same batches.
            measure: whether the test split is measured right after this call (`personalised`; the last one counts).
            mean_gradient: whether to return the mean of the steps' gradients, before steering and clipping.

        Returns:
            With `mean_gradient` a vector per group of the adapter, [layout.size], zero where nothing trained.

        Raises:
            ConfigError: the tier's engine cannot do it; `fedray plan` and `run` say so before anything starts.
            TrainingError: see `fedray.training.loop.check_call`; or a loss or value that is not finite.
        """
        ...

    def measure(self) -> None:
        """Measure the test split (`personalised`) with what is loaded now, where the round is measured: for a method
        that loads another model after its last training."""
        ...

    def evaluate(self, split: Split, *, generating: bool = False) -> Evaluation:
        """Evaluate the adapter as it is loaded now.

        Args:
            generating: whether text is generated for a metric that compares generated text, which takes many times as
                long as the loss; otherwise such a metric is nan.
        """
        ...

    def importance(self) -> Mapping[str, npt.NDArray[np.float64]]:
        """Return, per LoRA target module, the empirical Fisher information of each output dimension, [d_out]."""
        ...

    def features(self, split: Split, rows: Sequence[int]) -> Vector:
        """Return what the model makes of some examples of a split with the adapter as it is loaded now: the last hidden
        state of each one's last prompt token, [rows, d]."""
        ...

    def weight_gradients(self, rank: int, max_examples: int) -> Mapping[str, LowRank]:
        """Return the gradient of the mean loss of the first training examples, at most `max_examples`, with respect to
        the frozen weight of each LoRA target module, [d_out, d_in], approximated with rank `rank`, by module path."""
        ...

    def rng(self, purpose: str) -> np.random.Generator:
        """Return the generator keyed by (seed, purpose, round, client)."""
        ...

    def record(self, name: str, value: float | Sequence[float]) -> None:
        """Add a column to this client's row of `clients.parquet`."""
        ...


class FederatedMethod(Protocol[ServerState, ClientState, Downlink, Uplink]):
    """States, downlinks and uplinks are frozen dataclasses of arrays, numbers, and mappings or tuples of these. States
    are kept in files: their classes are registered with `fedray.state_type`."""

    def attach(self, model: nn.Module) -> Adapter:
        """Insert the adapter's modules into the frozen model and choose the groups that train. Also called with a
        model on the meta device, to know layouts without weights."""
        ...

    def init_server(self, initial: Initial, clients: Sequence[Client]) -> ServerState: ...

    def init_client(self, initial: Initial, client: Client) -> ClientState:
        """Return the private state of a client that has never trained. Called on an actor, before its first task."""
        ...

    def configure_train(self, server: ServerState, cohort: Sequence[Client]) -> Downlinks[Downlink]:
        """Return what each client of the cohort receives, and change nothing. A payload for several clients is a
        `Broadcast`: it is sent once per node, and counted once per client."""
        ...

    def train_client(
        self, adapter: Adapter, client_state: ClientState, downlink: Downlink, local: Local
    ) -> tuple[Uplink, ClientState]:
        """Load every group that the method uses, call `local.train`, and return what goes up and what stays.
        The adapter may hold another client's values on entry."""
        ...

    def aggregate_train(self, server: ServerState, updates: Sequence[Uploaded[Uplink]]) -> tuple[ServerState, Metrics]:
        """Return the next server state from the updates, in the order of client ids; from one mean per tier, in the
        order of the tiers' names, if the method says `averages`. There may be none, if all clients dropped out or were
        too late."""
        ...


AnyMethod = FederatedMethod[Any, Any, Any, Any]


def admitted(method: AnyMethod, server: Any, client: Client) -> Any:
    """Return the server's state with one more client, which was absent until now: what the method's
    `admit(server, client)` says, or the same state, if the method has no such function."""
    admit = getattr(method, "admit", None)
    return server if admit is None else admit(server, client)


def name_of(method: Any) -> str:
    """Return what messages call a method: a built-in one by its file, any other by its class."""
    package, _, module = type(method).__module__.rpartition(".")
    return module if package == "fedray.methods" else type(method).__name__


def needs(method: Any, option: str, condition: bool, remedy: str) -> None:
    """Refuse a hyperparameter that was changed and would silently do nothing.

    Args:
        method: the dataclass.
        option: name of the hyperparameter.
        condition: whether it has an effect.
        remedy: the setting that gives it one.

    Raises:
        ConfigError: it is not at its default, and has no effect.
    """
    (default,) = (field.default for field in dataclasses.fields(method) if field.name == option)
    if not condition and getattr(method, option) != default:
        raise ConfigError(
            f"{name_of(method)}.{option}: has no effect without {remedy}; set that, or leave {option} out"
        )


def averages(method: AnyMethod) -> Averages | None:
    """Return what clients count for in the method's mean, or None if the method needs every update: it has no
    `averages`, or a class derived from the one with `averages` has an `aggregate_train` of its own.

    Raises:
        ConfigError: `averages` has another value.
    """
    found: Averages | None = getattr(method, "averages", None)
    definers = [cls for cls in type(method).__mro__ if {"averages", "aggregate_train"} & vars(cls).keys()]
    if found is None or (definers and "averages" not in vars(definers[0])):
        return None
    if found not in get_args(Averages):
        raise ConfigError(f"{type(method).__name__}.averages: expected {choices(get_args(Averages))}, got {found!r}")
    return found
