"""Messages between the pool and its actors: task batches to an actor, `ResultBatch`es back.

Shards and large payloads are in Ray's object store; small payloads travel with the tasks, because an object costs more
time than they do. In a task batch the field `shard` of a `ClientTask` is an `ObjectSlot`, and so is `downlink.payload`
if the payload is large.
"""

import os
import pickle
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayTaskError

from fedray.config.registry import own_folders, search_in
from fedray.data.shards import Shard, ShardPack
from fedray.errors import ConfigError, FedrayError
from fedray.federation.result_batches import BATCH_SECONDS, ResultBatch
from fedray.federation.tasks import ClientTask, Downlink
from fedray.types import ClientId

PACK_CLIENTS = 64
"""Clients whose shards share one object: an actor fetches the object once, and maps its contents."""

SMALL_BYTES = 100_000
"""Payloads of fewer bytes travel with the tasks."""


class ObjectSlot(NamedTuple):
    """One entry of an object that holds several.

    Attributes:
        ref: the object's reference; in a message, its position in the message's list of references.
        index: index or key of the entry in the object, a sequence or a mapping.
    """

    ref: Any
    index: Any


class Message(NamedTuple):
    """A value pickled here, because Ray's own pickler calls back into Python for every object in it.

    Attributes:
        pickled: the pickled value without the memory of its arrays.
        buffers: the memory of its arrays, which is not copied.
        folders: where the sender looks for users' own modules: Ray's processes have another current folder.
    """

    pickled: bytes
    buffers: list[pickle.PickleBuffer]
    folders: tuple[str, ...] = ()


def to_message(value: Any) -> Message:
    """Pickle a value."""
    buffers: list[pickle.PickleBuffer] = []
    return Message(pickle.dumps(value, protocol=5, buffer_callback=buffers.append), buffers, own_folders())


def from_message(message: Message) -> Any:
    """Return the value of a message.

    Raises:
        ConfigError: this process cannot import the class of something in it.
    """
    # Only messages of this run's Ray processes are unpickled here: none from a disk or another source.
    search_in(message.folders)
    try:
        return pickle.loads(message.pickled, buffers=message.buffers)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"node {os.uname().nodename}: {error}; classes of your own must be in files that all nodes can import"
        ) from error


class TaskBatch(NamedTuple):
    """Groups of tasks on their way to an actor.

    Attributes:
        groups: the groups, as lists of `ClientTask`.
        refs: the references to which the tasks' slots point.
        batch_seconds: how long a batch of their results lasts.
    """

    groups: Message
    refs: list[Any]
    batch_seconds: float


def task_batch(
    groups: Sequence[Sequence[ClientTask]],
    downlinks: Mapping[int, Downlink],
    shards: Mapping[ClientId, ObjectSlot],
    batch_seconds: float = BATCH_SECONDS,
) -> TaskBatch:
    """Return tasks as a message.

    Args:
        downlinks, shards: where the tasks' downlinks and shards are (`put_downlinks`, `put_shards`).
        batch_seconds: how long a batch of their results lasts.
    """
    places: dict[Any, int] = {}
    travelling: dict[int, Downlink] = {}

    def placed(slot: ObjectSlot) -> ObjectSlot:
        return ObjectSlot(places.setdefault(slot.ref, len(places)), slot.index)

    for key in {task.downlink.key: None for group in groups for task in group}:
        sent = downlinks[key]
        large = isinstance(sent.payload, ObjectSlot)
        travelling[key] = sent._replace(payload=placed(sent.payload)) if large else sent
    sent_groups = [
        [task._replace(downlink=travelling[task.downlink.key], shard=placed(shards[task.client.id])) for task in group]
        for group in groups
    ]
    return TaskBatch(to_message(sent_groups), list(places), batch_seconds)


def resolve_tasks(batch: TaskBatch, cache: dict[Any, Any]) -> list[list[ClientTask]]:
    """Fetch the objects that the tasks name, each once, and return the groups with their payloads and shards.

    Args:
        cache: fetched packs of shards by reference, which later batches use too; they are mapped and not copied.
    """
    groups, refs = from_message(batch.groups), batch.refs
    tasks = [task for group in groups for task in group]
    downlinks = {task.downlink.key: task.downlink for task in tasks}
    large = {key: down.payload for key, down in downlinks.items() if isinstance(down.payload, ObjectSlot)}
    payloads = _fetch({refs[slot.ref] for slot in large.values()})
    cache.update(_fetch({refs[task.shard.ref] for task in tasks} - cache.keys()))
    downlinks |= {
        key: downlinks[key]._replace(payload=payloads[refs[slot.ref]][slot.index]) for key, slot in large.items()
    }
    return [
        [
            task._replace(downlink=downlinks[task.downlink.key], shard=cache[refs[task.shard.ref]][task.shard.index])
            for task in group
        ]
        for group in groups
    ]


def _fetch(refs: set[Any]) -> dict[Any, Any]:
    ordered = list(refs)
    return dict(zip(ordered, ray.get(ordered), strict=True))


def next_result_batch(stream: Any) -> ResultBatch:
    """Return the next batch of results of a task batch.

    Raises:
        RayActorError: the actor died.
        ObjectLostError: the node died, and the batch was lost with it.
        FedrayError: the client's own code raised it.
    """
    batch: ResultBatch = from_message(get(next(stream)))
    return batch


def put_downlinks(tasks: Iterable[ClientTask]) -> dict[int, Downlink]:
    """Return the tasks' downlinks by their keys, with large payloads in the object store, each once, and slots for
    them."""
    distinct = {task.downlink.key: task.downlink for task in tasks}
    return {
        key: downlink
        if downlink.num_bytes < SMALL_BYTES
        else downlink._replace(payload=ObjectSlot(ray.put([downlink.payload]), 0))
        for key, downlink in distinct.items()
    }


def put_shards(shards: Mapping[ClientId, Shard]) -> dict[ClientId, ObjectSlot]:
    """Put the clients' shards into the object store, those of `PACK_CLIENTS` clients as one object."""
    ids = sorted(shards)
    placed: dict[ClientId, ObjectSlot] = {}
    for start in range(0, len(ids), PACK_CLIENTS):
        together = ids[start : start + PACK_CLIENTS]
        ref = ray.put(ShardPack.of([shards[id] for id in together]))
        placed |= {id: ObjectSlot(ref, id) for id in together}
    return placed


def get(refs: Any) -> Any:
    """Do `ray.get`, and raise fedray's own errors as they are, without Ray's wrapper."""
    try:
        return ray.get(refs)
    except RayTaskError as error:
        if isinstance(error.cause, FedrayError):
            raise error.cause from None
        raise
