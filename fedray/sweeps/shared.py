"""What the trials of a sweep share: client actors that outlive a trial, and data sets that are loaded once."""

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
from fedray.runtime.messages import Message, from_message, get, to_message
from fedray.runtime.silo_actor import start_silo

MAX_DATA_SETS = 8
"""Most data sets that are kept for later trials."""


@ray.remote(num_cpus=0)
class SharedActors:
    """Owns client actors and assigns them to trials. Idle actors are reused for identical resource requests; other
    requests end them to make room."""

    def __init__(self) -> None:
        self._idle: dict[str, list[Any]] = {}
        self._assigned: dict[Any, tuple[str, str, Any]] = {}

    def acquire(self, trial: str, resources: Amounts) -> Any:
        """Return an actor with these resources, and assign it to the trial."""
        shape = json.dumps(sorted(resources.items()))
        if not self._idle.get(shape):
            for actor in (actor for idle in self._idle.values() for actor in idle):
                ray.kill(actor)
            self._idle = {shape: [start_actor(resources)]}
        actor = self._idle[shape].pop()
        self._assigned[actor._actor_id] = (trial, shape, actor)
        return actor

    def release(self, actor: Any) -> None:
        """Take an actor back for later trials."""
        if (entry := self._assigned.pop(actor._actor_id, None)) is not None:
            self._idle.setdefault(entry[1], []).append(actor)

    def discard(self, actor: Any) -> None:
        """End an actor that cannot be used any more."""
        self._assigned.pop(actor._actor_id, None)
        with suppress(RayError):
            ray.kill(actor)

    def reclaim(self, trial: str) -> None:
        """End the actors of a trial that did not release them."""
        for name, _, actor in list(self._assigned.values()):
            if name == trial:
                self.discard(actor)


class SharedActorSource:
    """Gets a trial's client actors from `SharedActors`. Silos are several processes in a placement group, so each trial
    starts its own."""

    def __init__(self, shared: Any, trial: str):
        self._shared, self._trial = shared, trial
        self._silos: list[Any] = []

    def start(self, resources: Amounts, workers: int) -> Any:
        """See `ActorSource.start`."""
        if workers > 1:
            self._silos.append(start_silo(workers, dict(resources)))
            return self._silos[-1]
        return ray.get(self._shared.acquire.remote(self._trial, dict(resources)))

    def end(self, actor: Any) -> None:
        """See `ActorSource.end`."""
        self._shared.discard.remote(actor)

    def release(self, actor: Any) -> None:
        """See `ActorSource.release`."""
        if actor in self._silos:
            self.end(actor)
        else:
            self._shared.release.remote(actor)


@ray.remote(num_cpus=0)
class DatasetCache:
    """Keeps the data sets of a sweep's trials in the object store. Each is loaded once, and the trials that use it map
    it."""

    def __init__(self) -> None:
        self._found: OrderedDict[str, Any] = OrderedDict()
        self.loads = 0

    def data(self, message: Message) -> list[Any]:
        """Return a reference to the data of an experiment.

        Args:
            message: contains the experiment's configuration.

        Returns:
            The reference in a list: Ray would resolve a bare one.

        Raises:
            DataError: the data do not match the configuration.
        """
        config: Config = from_message(message)
        key = _data_key(config)
        if key not in self._found:
            self.loads += 1
            self._found[key] = ray.put(load_federated_data(config, load_tokenizer(config.model)))
        self._found.move_to_end(key)
        while len(self._found) > MAX_DATA_SETS:
            self._found.popitem(last=False)
        return [self._found[key]]

    def num_loads(self) -> int:
        """Return how many data sets have been loaded."""
        return self.loads


class CachedDatasets:
    """Loads an experiment's data as `load_federated_data` does, from a `DatasetCache`."""

    def __init__(self, cache: Any):
        self._cache = cache

    def __call__(self, config: Config, tokenizer: PreTrainedTokenizerBase) -> FederatedData:
        (ref,) = get(self._cache.data.remote(to_message(config)))
        data: FederatedData = ray.get(ref)
        return data


def _data_key(config: Config) -> str:
    """Return a hash of everything in the configuration that `load_federated_data` depends on."""
    found: Mapping[str, Any] = to_mapping(config)
    sections = {name: found[name] for name in ("data", "partition", "task", "seed", "model")}
    text = json.dumps([sections, config.clients.count], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
