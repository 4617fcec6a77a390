"""What travels between the pool and its actors: chunks of turns there, `ResultBatch`s back.

Values lie in Ray's object store, small ones together in one object, and are named by `ObjectSlot`.
"""

import pickle
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayTaskError

from fedray.data.shards import Shard, ShardPack
from fedray.errors import FedrayError
from fedray.federation.result_batches import BATCH_SECONDS, Given, ResultBatch
from fedray.federation.worker import ClientTask
from fedray.storage.client_states import StateRef
from fedray.storage.state_tree import num_bytes
from fedray.types import ClientId

PACK_CLIENTS = 64
"""So many clients' shards are one object: an actor fetches it once, and maps what it holds."""

SMALL_BYTES = 100_000
"""Downlinks of fewer bytes are packed into one object."""


class ObjectSlot(NamedTuple):
    """One entry of an object that holds several: `index` into a sequence or a mapping. ref: the object's reference, or
    on its way the place of that in the chunk's list."""

    ref: Any
    index: Any


class Turn(NamedTuple):
    """One client's turn; the state is in a file, None on the client's first turn. Downlink and shard lie in Ray's
    object store: `ref` is the place of their reference in the chunk's list."""

    assignment: ClientTask
    downlink: ObjectSlot
    state: StateRef | None
    shard: ObjectSlot


class Message(NamedTuple):
    """A value on its way, pickled by itself: Ray's own pickler calls back into Python for every object in it.

    buffers: memory of its arrays, which is not copied.
    """

    pickled: bytes
    buffers: list[pickle.PickleBuffer]


def to_message(value: Any) -> Message:
    buffers: list[pickle.PickleBuffer] = []
    return Message(pickle.dumps(value, protocol=5, buffer_callback=buffers.append), buffers)


def from_message(sealed: Message) -> Any:
    # Only what Ray's processes of this run have sealed comes here, nothing from a disk or a stranger.
    return pickle.loads(sealed.pickled, buffers=sealed.buffers)


class TaskBatch(NamedTuple):
    """Groups of turns on their way to an actor, the references that they name, and how many seconds their blocks
    last."""

    groups: Message
    refs: list[Any]
    block_seconds: float


def task_batch(groups: Sequence[Sequence[Turn]], block_seconds: float = BATCH_SECONDS) -> TaskBatch:
    """Return turns, whose downlinks and shards name references themselves, as what travels."""
    places: dict[Any, int] = {}

    def named(packed: ObjectSlot) -> ObjectSlot:
        return ObjectSlot(places.setdefault(packed.ref, len(places)), packed.index)

    turns = [
        [turn._replace(downlink=named(turn.downlink), shard=named(turn.shard)) for turn in group] for group in groups
    ]
    return TaskBatch(to_message(turns), list(places), block_seconds)


def unpack(chunk: TaskBatch, cache: dict[Any, Any]) -> list[Given]:
    """Fetch what the turns name, once for all; return every group's assignments, downlinks, states' places and shards.

    cache: what was fetched and stays good for later chunks: packs of shards, which are mapped and not copied.
    """
    groups, refs = from_message(chunk.groups), chunk.refs
    turns = [turn for group in groups for turn in group]
    found = _fetch({refs[turn.downlink.ref] for turn in turns})
    cache.update(_fetch({refs[turn.shard.ref] for turn in turns} - cache.keys()))
    return [
        (
            [turn.assignment for turn in group],
            [found[refs[turn.downlink.ref]][turn.downlink.index] for turn in group],
            [turn.state for turn in group],
            [cache[refs[turn.shard.ref]][turn.shard.index] for turn in group],
        )
        for group in groups
    ]


def _fetch(refs: set[Any]) -> dict[Any, Any]:
    ordered = list(refs)
    return dict(zip(ordered, ray.get(ordered), strict=True))


def next_result_batch(stream: Any) -> ResultBatch:
    """Return the next block of a chunk.

    Raises:
        RayActorError, ObjectLostError: the actor died, or its node with the block. FedrayError: what the client's own
            code raised.
    """
    block: ResultBatch = from_message(get(next(stream)))
    return block


def put_downlinks(downlinks: Mapping[ClientId, Any]) -> dict[ClientId, ObjectSlot]:
    """Put what goes down into the object store: equal payloads once, large ones each, all small ones together."""
    distinct = {id(payload): payload for payload in downlinks.values()}
    small = {key: payload for key, payload in distinct.items() if num_bytes(payload) < SMALL_BYTES}
    together = ray.put(small)
    refs = {key: (together, key) if key in small else (ray.put([payload]), 0) for key, payload in distinct.items()}
    return {client: ObjectSlot(*refs[id(payload)]) for client, payload in downlinks.items()}


def put_shards(shards: Mapping[ClientId, Shard]) -> dict[ClientId, ObjectSlot]:
    ids = sorted(shards)
    packed: dict[ClientId, ObjectSlot] = {}
    for start in range(0, len(ids), PACK_CLIENTS):
        together = ids[start : start + PACK_CLIENTS]
        ref = ray.put(ShardPack.of([shards[id] for id in together]))
        packed |= {id: ObjectSlot(ref, id) for id in together}
    return packed


def get(refs: Any) -> Any:
    """ray.get, with fedray's own errors as themselves and not wrapped in Ray's."""
    try:
        return ray.get(refs)
    except RayTaskError as error:
        if isinstance(error.cause, FedrayError):
            raise error.cause from None
        raise
