"""What travels between the pool and its actors: chunks of turns there, blocks of outcomes and next states back.

Values lie in Ray's object store, small ones together in one object, and are named by `Packed`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayTaskError

from fedray.data.shards import Shard
from fedray.errors import FedrayError
from fedray.state import num_bytes
from fedray.types import ClientId
from fedray.worker import Assignment, Outcome

PACK_CLIENTS = 64
"""So many clients' shards are one object: an actor fetches it once, and maps what it holds."""

SMALL_BYTES = 100_000
"""Downlinks of fewer bytes are packed into one object."""

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


Given = tuple[list[Assignment], list[Any], list[Any], list[Shard]]
Train = Callable[[Sequence[Assignment], Sequence[Any], Sequence[Any], Sequence[Shard]], Iterable[tuple[Outcome, Any]]]
"""Given a group's assignments, downlinks, states and shards; see `Worker.train_many`."""


def serve(train: Train, groups: Sequence[Sequence[Turn]], cache: dict[Any, Any]) -> Iterator[Any]:
    """Let the groups of clients take their turns, in order; yield for every block of whole groups its list of next
    states, and then its list of outcomes.

    cache: what was fetched and stays good for later chunks: packs of shards, which are mapped and not copied.
    """
    outcomes: list[Outcome] = []
    states: list[Any] = []
    started, size = monotonic(), 0
    for given in unpack(groups, cache):
        for outcome, after in train(*given):
            outcomes.append(outcome)
            states.append(after)
            size += num_bytes(after)
        if monotonic() - started > BLOCK_SECONDS or len(outcomes) >= BLOCK_CLIENTS or size > BLOCK_BYTES:
            yield states
            yield outcomes
            outcomes, states = [], []
            started, size = monotonic(), 0
    if outcomes:
        yield states
        yield outcomes


def unpack(groups: Sequence[Sequence[Turn]], cache: dict[Any, Any]) -> Iterator[Given]:
    """Fetch what the turns name, once for all; yield every group's assignments, downlinks, states and shards."""
    turns = [turn for group in groups for turn in group]
    found = _fetch({packed.ref for turn in turns for packed in (turn.downlink, turn.state) if packed is not None})
    cache.update(_fetch({turn.shard.ref for turn in turns} - cache.keys()))
    for group in groups:
        yield (
            [turn.assignment for turn in group],
            [found[turn.downlink.ref][turn.downlink.index] for turn in group],
            [None if turn.state is None else found[turn.state.ref][turn.state.index] for turn in group],
            [cache[turn.shard.ref][turn.shard.index] for turn in group],
        )


def _fetch(refs: set[Any]) -> dict[Any, Any]:
    ordered = list(refs)
    return dict(zip(ordered, ray.get(ordered), strict=True))


def next_block(stream: Any) -> tuple[Any, list[Outcome]] | None:
    """Return the next block's states, as a reference, and its outcomes; None at the end of the chunk.

    Raises:
        RayActorError: the actor died. FedrayError: what the client's own code raised.
    """
    try:
        states = next(stream)
    except StopIteration:
        return None
    try:
        return states, get(next(stream))
    except StopIteration:  # instead of a block there was an error
        get(states)
        raise


def pack_downlinks(downlinks: Mapping[ClientId, Any]) -> dict[ClientId, Packed]:
    """Put what goes down into the object store: equal payloads once, large ones each, all small ones together."""
    distinct = {id(payload): payload for payload in downlinks.values()}
    small = {key: payload for key, payload in distinct.items() if num_bytes(payload) < SMALL_BYTES}
    together = ray.put(small)
    refs = {key: (together, key) if key in small else (ray.put([payload]), 0) for key, payload in distinct.items()}
    return {client: Packed(*refs[id(payload)]) for client, payload in downlinks.items()}


def pack_shards(shards: Mapping[ClientId, Shard]) -> dict[ClientId, Packed]:
    ids = sorted(shards)
    packed: dict[ClientId, Packed] = {}
    for start in range(0, len(ids), PACK_CLIENTS):
        pack = {id: shards[id] for id in ids[start : start + PACK_CLIENTS]}
        ref = ray.put(pack)
        packed |= {id: Packed(ref, id) for id in pack}
    return packed


def get(refs: Any) -> Any:
    """ray.get, with fedray's own errors as themselves and not wrapped in Ray's."""
    try:
        return ray.get(refs)
    except RayTaskError as error:
        if isinstance(error.cause, FedrayError):
            raise error.cause from None
        raise
