"""What the trials of a sweep share: client actors that outlive them, and data that is read once."""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError
from transformers import PreTrainedTokenizerBase

from fedray.config import Config, to_mapping
from fedray.data.load import load_federated_data
from fedray.data.shards import FederatedData
from fedray.models.tokenizer import load_tokenizer
from fedray.planning.placement import Amounts
from fedray.runtime.actor_group import start_actor
from fedray.runtime.messages import get
from fedray.runtime.silo_actor import start_silo

DATA_SETS = 8
"""So many are kept for trials to come."""


@ray.remote(num_cpus=0)
class SharedActors:
    """Owns client actors and lends them to trials. Actors of one process are lent again to whoever asks for the same
    resources; where others are asked for, idle ones make room."""

    def __init__(self) -> None:
        self._idle: dict[str, list[Any]] = {}
        self._lent: dict[Any, tuple[str, str, Any]] = {}

    def borrow(self, borrower: str, asked: Amounts) -> Any:
        """Return an actor that asks for these resources."""
        shape = json.dumps(sorted(asked.items()))
        if not self._idle.get(shape):
            for handle in (handle for idle in self._idle.values() for handle in idle):
                ray.kill(handle)
            self._idle = {shape: [start_actor(asked)]}
        handle = self._idle[shape].pop()
        self._lent[handle._actor_id] = (borrower, shape, handle)
        return handle

    def release(self, handle: Any) -> None:
        if (entry := self._lent.pop(handle._actor_id, None)) is not None:
            self._idle.setdefault(entry[1], []).append(handle)

    def discard(self, handle: Any) -> None:
        """End an actor that is of no use any more."""
        self._lent.pop(handle._actor_id, None)
        with suppress(RayError):
            ray.kill(handle)

    def reclaim(self, borrower: str) -> None:
        """End what is lent to a trial that did not give it back."""
        for name, _, handle in list(self._lent.values()):
            if name == borrower:
                self.discard(handle)


class SharedActorSource:
    """Where a trial's client actors come from. Silos are several processes in a placement group: each trial starts its
    own."""

    def __init__(self, lender: Any, borrower: str):
        self._lender, self._borrower = lender, borrower
        self._silos: list[Any] = []

    def start(self, asked: Amounts, workers: int) -> Any:
        if workers > 1:
            self._silos.append(start_silo(workers, dict(asked)))
            return self._silos[-1]
        return ray.get(self._lender.borrow.remote(self._borrower, dict(asked)))

    def end(self, handle: Any) -> None:
        self._lender.discard.remote(handle)

    def release(self, handle: Any) -> None:
        if handle in self._silos:
            self.end(handle)
        else:
            self._lender.release.remote(handle)


@ray.remote(num_cpus=0)
class DatasetCache:
    """Data of a sweep's trials in the object store: each set is loaded once, and mapped by whoever trains on it."""

    def __init__(self) -> None:
        self._found: OrderedDict[str, Any] = OrderedDict()
        self.loads = 0

    def data(self, config: Config) -> list[Any]:
        """Return a reference, in a list, to the data of an experiment.

        Raises:
            DataError: they are not what the configuration says.
        """
        key = _data_key(config)
        if key not in self._found:
            self.loads += 1
            self._found[key] = ray.put(load_federated_data(config, load_tokenizer(config.model)))
        self._found.move_to_end(key)
        while len(self._found) > DATA_SETS:
            self._found.popitem(last=False)
        return [self._found[key]]

    def num_loads(self) -> int:
        """Return how many sets have been loaded."""
        return self.loads


class CachedDatasets:
    """Loads an experiment's data as `load_federated_data` does."""

    def __init__(self, shelf: Any):
        self._shelf = shelf

    def __call__(self, config: Config, tokenizer: PreTrainedTokenizerBase) -> FederatedData:
        (ref,) = get(self._shelf.data.remote(config))
        data: FederatedData = ray.get(ref)
        return data


def _data_key(config: Config) -> str:
    """Return what the data depend on: `load_federated_data` reads nothing else."""
    found: Mapping[str, Any] = to_mapping(config)
    sections = {name: found[name] for name in ("data", "partition", "task", "seed", "model")}
    text = json.dumps([sections, config.clients.count], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
