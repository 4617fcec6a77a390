"""ClientActor: a worker as a Ray actor. It gets clients in chunks and streams their results back in blocks."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any, NamedTuple

import ray
import torch

from fedray.config.clients import OffloadConfig
from fedray.data.shards import Shard
from fedray.methods.protocol import Initial
from fedray.state import num_bytes
from fedray.training.deepspeed import compile_extensions
from fedray.worker import Assignment, Job, Outcome, Worker

BLOCK_SECONDS = 0.1
BLOCK_CLIENTS = 64
BLOCK_BYTES = 100_000
"""A block is sent on when it has lasted this long, or has so many clients or bytes of state: a death loses one block,
and a client's large state is an object of its own."""


class Packed(NamedTuple):
    """One entry of an object that holds several: `index` into a sequence or a mapping."""

    ref: Any
    index: Any


@dataclass(frozen=True)
class Turn:
    """One client's turn; what travels beside the assignment lies in Ray's object store.

    state: None on the client's first turn.
    """

    assignment: Assignment
    downlink: Packed
    state: Packed | None
    shard: Packed


Train = Callable[[Assignment, Any, Any, Shard], tuple[Outcome, Any]]


def serve(train: Train, turns: Sequence[Turn], cache: dict[Any, Any]) -> Iterator[Any]:
    """Let the clients take their turns, in order; yield for every block its list of next states, and then its list of
    outcomes.

    cache: what was fetched and stays good for later chunks: packs of shards, which are mapped and not copied.
    """
    found = _fetch({packed.ref for turn in turns for packed in (turn.downlink, turn.state) if packed is not None})
    missing = {turn.shard.ref for turn in turns} - cache.keys()
    cache.update(_fetch(missing))
    outcomes: list[Outcome] = []
    states: list[Any] = []
    started, size = monotonic(), 0
    for turn in turns:
        state = None if turn.state is None else found[turn.state.ref][turn.state.index]
        downlink = found[turn.downlink.ref][turn.downlink.index]
        outcome, after = train(turn.assignment, downlink, state, cache[turn.shard.ref][turn.shard.index])
        outcomes.append(outcome)
        states.append(after)
        size += num_bytes(after)
        if monotonic() - started > BLOCK_SECONDS or len(outcomes) == BLOCK_CLIENTS or size > BLOCK_BYTES:
            yield states
            yield outcomes
            outcomes, states = [], []
            started, size = monotonic(), 0
    if outcomes:
        yield states
        yield outcomes


def _fetch(refs: set[Any]) -> dict[Any, Any]:
    ordered = list(refs)
    return dict(zip(ordered, ray.get(ordered), strict=True))


@ray.remote(max_restarts=0)
class ClientActor:
    """One frozen base model and one adapter on a share of a node, serving any client.

    gpus: its share of a GPU; without one it does not see any.

    It keeps nothing of a client's between two: state and shard come as references, the next state goes back as one.
    """

    def __init__(self, gpus: float) -> None:
        if gpus == 0:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray hides no GPU from an actor that asked for none
        self.worker = Worker()
        self._shards: dict[Any, Any] = {}

    def ready(self) -> None:
        """Return once the actor has started."""

    def setup(self, job: Job) -> None:
        self.worker.setup(job)

    def initial(self) -> Initial:
        return self.worker.initial()

    @ray.method(num_returns="streaming")
    def train(self, turns: Sequence[Turn]) -> Iterator[Any]:
        """See `serve`."""
        yield from serve(self.worker.train, turns, self._shards)

    def close(self) -> None:
        """Nothing that outlives the process."""


@ray.remote(num_cpus=0, max_calls=1, max_retries=0)  # DeepSpeed asks for the kind of device once per process
def build_extensions(offload: OffloadConfig, gpus: float) -> None:
    """Build DeepSpeed's extensions on the node where this runs; see `compile_extensions`. gpus: as of ClientActor."""
    if gpus == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    compile_extensions(offload, "cuda" if torch.cuda.is_available() else "cpu")
