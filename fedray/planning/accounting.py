"""What a method trains and sends, counted exactly before anything is trained.

The method's own code runs two rounds with two clients on shapes alone: its adapter is attached to a model without
weights (meta device), and every value is zero. A user's own method is therefore counted like a built-in one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fedray.adapters.adapter import Adapter
from fedray.aggregation.low_rank import LowRank
from fedray.federation.tasks import downlinks_of
from fedray.federation.update_checks import Expected
from fedray.methods.protocol import AnyMethod, Initial, TierMean, Update, averages
from fedray.randomness import keyed_rng
from fedray.storage.codec import pack_small
from fedray.storage.state_tree import float_arrays, leaves, num_bytes, signature_of
from fedray.training.loop import check_call
from fedray.training.steering import Steering
from fedray.types import Client, Evaluation, Split, Vector


@dataclass(frozen=True)
class Cost:
    """What one client of a tier trains and sends in one round, as of the method's second round: the first one may
    differ.

    Attributes:
        trainable: parameters that a client trains.
        total: parameters of the model with the whole adapter.
        uplink, downlink: numbers sent.
        uplink_bytes, downlink_bytes: bytes of these numbers as they travel.
        head: how the method treats the task head; `-` if there is none.
        shapes: signatures of the uplink in the first round and in later ones.
        asked: arguments of `Local.train` that only some engines can do (`EngineConfig.steers`).
        personalised: whether clients end up with models of their own; otherwise the server has one for all.
        evaluated: splits that the method itself evaluates.
    """

    trainable: int
    total: int
    uplink: int
    downlink: int
    uplink_bytes: int
    downlink_bytes: int
    head: str
    shapes: Expected = field(default=frozenset(), compare=False, repr=False)
    asked: frozenset[str] = field(default=frozenset(), compare=False, repr=False)
    personalised: bool = field(default=True, compare=False, repr=False)
    evaluated: frozenset[Split] = field(default=frozenset(), compare=False, repr=False)


@dataclass(frozen=True)
class Attached:
    """A method with its adapter on a model on the meta device."""

    method: AnyMethod
    adapter: Adapter


@dataclass(frozen=True)
class Exchange:
    """What one client had in the second of two rounds on shapes; every value is zero.

    Attributes:
        trainable: parameters that it trained.
        downlink, uplink: payloads that it received and sent.
        state: what it keeps.
        shapes: signatures of the uplink in the first round and in later ones.
        asked: arguments of `Local.train` that only some engines can do.
        evaluated: splits that the method itself evaluates.
    """

    trainable: int
    downlink: Any
    uplink: Any
    state: Any
    shapes: Expected
    asked: frozenset[str]
    evaluated: frozenset[Split]


def method_cost(
    whole: Attached, held: Attached, clients: Sequence[Client], seed: int = 0, validation_examples: int = 1
) -> Cost:
    """Return what the last of `clients`, all of one tier, trains and sends.

    Args:
        whole: the method as the driver has it.
        held: the method as the tier's devices have it; the same object if they hold the whole adapter.
        validation_examples: validation examples of every client.
    """
    total = sum(parameter.numel() for parameter in held.adapter.model.parameters())  # before rows are masked
    found = exchange(whole, held, clients, seed, validation_examples)
    method, up, down = whole.method, found.uplink, found.downlink
    head = getattr(method, "effective_head", getattr(method, "head", "-")) if "head" in held.adapter.names else "-"
    sizes = numbers(up), numbers(down), num_bytes(up), num_bytes(down)
    personalised = getattr(method, "personalised", numbers(found.state) > 0)
    return Cost(found.trainable, total, *sizes, head, found.shapes, found.asked, personalised, found.evaluated)


def exchange(
    whole: Attached, held: Attached, clients: Sequence[Client], seed: int = 0, validation_examples: int = 1
) -> Exchange:
    """Run two rounds on shapes and return what the last client had in the second; arguments as of `method_cost`."""
    method, shapes = whole.method, Shapes(held.adapter)
    common, initial = _zeros(whole.adapter, seed), _zeros(held.adapter, seed)
    server = method.init_server(common, clients)
    states = {client.id: held.method.init_client(initial, client) for client in clients}
    seen, asked, evaluated = set(), set[str](), set[Split]()
    for server_round in range(2):
        downlinks = downlinks_of(method.configure_train(server, clients), clients)
        updates = []
        for client in clients:
            local = NoTraining(client, server_round, seed, shapes, validation_examples)
            payload, states[client.id] = held.method.train_client(
                shapes,  # type: ignore[arg-type]
                states[client.id],
                downlinks[client.id].payload,
                local,
            )
            updates.append(Update(client, client.num_examples, payload))
            seen.add(signature_of(leaves(payload)))
            asked |= local.asked
            evaluated |= local.evaluated
            pack_small(states[client.id])  # raises if the state could not be written to a file
        if server_round == 0:  # no client receives the second round's aggregate
            server, _ = method.aggregate_train(server, [_mean(updates)] if averages(method) else updates)
    last = clients[-1].id
    sent = downlinks[last].payload, payload
    return Exchange(local.trainable, *sent, states[last], frozenset(seen), frozenset(asked), frozenset(evaluated))


def _mean(updates: Sequence[Update[Any]]) -> TierMean[Any]:
    """Return the mean of one tier's updates. All of them are zero here, so any one of them is the mean.

    Raises:
        TypeError: a payload holds something other than arrays of floats, so that it cannot be averaged.
    """
    first = updates[0]
    float_arrays(leaves(first.payload))
    examples = sum(update.num_examples for update in updates)
    return TierMean(first.client.tier, first.capacity, examples, len(updates), first.payload)


def _zeros(adapter: Adapter, seed: int) -> Initial:
    layouts = {name: adapter.whole_layout(name) for name in adapter.names}
    zero = np.float32(0)  # one number in memory, whatever the size of the layout
    return Initial(seed, layouts, {name: np.broadcast_to(zero, layout.size) for name, layout in layouts.items()})


def numbers(payload: Any) -> int:
    """Return how many numbers a payload's arrays hold; bitsets (uint8) are not numbers."""
    arrays = [value for _, value in leaves(payload) if isinstance(value, np.ndarray)]
    return sum(array.size for array in arrays if array.dtype != np.uint8)


class Shapes:
    """An adapter that has layouts but no values: it reads zeros and checks the shapes of what is loaded. Everything
    else is delegated to the adapter."""

    def __init__(self, adapter: Adapter):
        adapter.settle()
        self.adapter = adapter

    def __getattr__(self, name: str) -> Any:
        return getattr(self.adapter, name)

    def read(self, name: str) -> Vector:
        return np.broadcast_to(np.float32(0), self.adapter.layout(name).size)  # one number in memory, see `_zeros`

    def load(self, name: str, vector: Vector) -> None:
        self.adapter.layout(name).items(vector)


@dataclass
class NoTraining:
    """A trainer of one client that changes nothing.

    Attributes:
        trained: how many values every slot has that `train` would have trained.
        asked: arguments of `train` that not every engine can do (`EngineConfig.steers`).
        evaluated: splits that `evaluate` was called with.
    """

    client: Client
    server_round: int
    seed: int
    shapes: Shapes
    validation_examples: int
    trained: dict[str, int] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)
    evaluated: set[Split] = field(default_factory=set)

    @property
    def measures(self) -> bool:
        """Only in the first round: what a method trains for an evaluation alone counts in no round's costs."""
        return self.server_round == 0

    @property
    def trainable(self) -> int:
        """Parameters that the round trains in any of its calls."""
        return sum(self.trained.values())

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
        check_call(self.shapes.adapter, parts, epochs, steps, steering, mean_gradient)
        used = {"parts": parts is not None, "steering": steering is not None, "mean_gradient": mean_gradient}
        self.asked |= {name for name, asked in used.items() if asked}
        with self.shapes.adapter.narrowed(parts):
            self.trained |= self.shapes.adapter.training_sizes()
        return {name: self.shapes.read(name) for name in self.shapes.names} if mean_gradient else {}

    def measure(self) -> None:
        return None

    def evaluate(self, split: Split, *, generating: bool = False) -> Evaluation:
        self.evaluated.add(split)
        return Evaluation(0.0, {"any": 0.0}, self.validation_examples)

    def importance(self) -> Mapping[str, npt.NDArray[np.float64]]:
        layout = self.shapes.layout("lora")
        return {slot.module: np.zeros(slot.shape[0]) for slot in layout.slots if slot.part == "B"}

    def features(self, split: Split, rows: Sequence[int]) -> Vector:
        return np.zeros((len(rows), self.shapes.model.config.get_text_config().hidden_size), np.float32)

    def weight_gradients(self, rank: int, max_examples: int) -> Mapping[str, LowRank]:
        return {path: LowRank.zeros(layer.d_out, layer.d_in, rank) for path, layer in self.shapes.targets.items()}

    def rng(self, purpose: str) -> np.random.Generator:
        return keyed_rng(self.seed, purpose, self.server_round, self.client.id)

    def record(self, name: str, value: Any) -> None:
        return None
