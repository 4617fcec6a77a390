"""A client's work in one round, as one record on the way to a worker and one on the way back.

Between the server and a worker, `downlink.payload`, `state` and `shard` are first the location of a value (a reference
into the object store, a file) and then the value itself: the code that needs the value replaces the field, and the
record stays complete. The records are named tuples, which are copied and pickled in a fraction of a dataclass's time.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import pyarrow as pa
from transformers import PretrainedConfig

from fedray.config import Config, MethodConfig
from fedray.errors import TrainingError, choices
from fedray.federation.update_checks import Expected
from fedray.methods.protocol import Broadcast, Downlinks
from fedray.storage.paths import StoragePath
from fedray.storage.state_tree import num_bytes
from fedray.training.trainer import ClientReport
from fedray.types import Client, ClientId, Vector

Keep = Literal["state", "adapter", "nothing"]


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker needs to serve one method on one tier: all that is equal for its clients and rounds.

    Attributes:
        folder: the run's folder, which all nodes see; None if nothing is kept, as when tasks are only timed.
        uplink: what updates look like; None allows anything.
        end_token_ids: tokens that end a generated text.
        common: the common test set; None if there is none.
        personalised: whether the method's clients end up with models of their own.
    """

    config: Config
    entry: MethodConfig
    architecture: PretrainedConfig
    label_names: tuple[str, ...]
    pad_token_id: int
    tier: str = "default"
    folder: StoragePath | None = None
    uplink: Expected | None = None
    end_token_ids: tuple[int, ...] = ()
    common: pa.Table | None = None
    personalised: bool = True


class Downlink(NamedTuple):
    """What the server sends to one client or, as one object, to several of them.

    Attributes:
        key: number of the broadcast in its round; tasks with equal keys share the payload.
        payload: the method's downlink, or where it is.
        num_bytes: bytes that each client receives.
    """

    key: int
    payload: Any
    num_bytes: int


class ClientTask(NamedTuple):
    """One client's work in one round.

    Attributes:
        measure: whether to evaluate before and after training.
        measure_server: whether to evaluate the server's model on the common test set, too.
        keep: what is kept afterwards: the client's next `state` (a round of training), the `adapter` (the final pass),
            or `nothing` (a task that is only timed).
        position: the client's place in the round's order of its tier, by which updates are added up.
        state: the client's private state, or where it is; None in its first task.
        shard: the client's examples, or where they are.
    """

    client: Client
    server_round: int
    downlink: Downlink
    measure: bool
    keep: Keep = "state"
    position: int = 0
    state: Any = None
    shard: Any = None
    measure_server: bool = False


class ClientResult(NamedTuple):
    """The result of a client's task.

    Attributes:
        num_examples: training examples of the client (n_k).
        payload: the method's uplink; None once it is part of a mean (`ResultBatch.means`).
        state: the client's next private state; once written, where it is, or None if it is not kept.
        adapter: the adapter's tensors by name, until they are written; None if the task does not keep them.
    """

    client: Client
    server_round: int
    num_examples: int
    payload: Any
    uplink_bytes: int
    downlink_bytes: int
    report: ClientReport
    state: Any = None
    adapter: Mapping[str, Vector] | None = None


def downlinks_of(sent: Downlinks[Any], cohort: Sequence[Client]) -> dict[ClientId, Downlink]:
    """Return each client's downlink from what a method's `configure_train` returned.

    Raises:
        TrainingError: a client of the cohort has no downlink, or more than one.
    """
    if isinstance(sent, Mapping):
        broadcasts = [Broadcast(payload, (client,)) for client, payload in sent.items()]
    else:
        broadcasts = [sent] if isinstance(sent, Broadcast) else list(sent)
    found: dict[ClientId, Downlink] = {}
    named: Counter[ClientId] = Counter()
    for key, broadcast in enumerate(broadcasts):
        downlink = Downlink(key, broadcast.payload, num_bytes(broadcast.payload))
        named.update(broadcast.clients)
        found |= dict.fromkeys(broadcast.clients, downlink)
    twice = [client for client, number in named.items() if number > 1]
    lacking = [client.id for client in cohort if client.id not in found]
    if lacking or twice:
        what = f"sends nothing to {choices(lacking, 5)}" if lacking else f"sends twice to {choices(twice, 5)}"
        raise TrainingError(f"configure_train: {what}; every client of the cohort needs exactly one payload")
    return found
