"""DriverActor: owns the pool and the federation, and streams what happens."""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayError

from fedray.config import ClientsConfig
from fedray.errors import FedrayError
from fedray.experiment.prepare import Prepared
from fedray.experiment.run import run_experiment
from fedray.federation.events import Event, RoundFinished, TasksFinished
from fedray.federation.local_pool import LocalPool
from fedray.planning.cluster_plan import Cluster
from fedray.runtime.cluster import living_nodes, on_callers_node
from fedray.runtime.pool import ClientPool
from fedray.storage.paths import StoragePath
from fedray.training.process_memory import freeze_heap

log = logging.getLogger(__name__)

MOMENT_S = 0.1
"""Clients that finish within this time are told together: a message costs more than a small client."""

GPU_PATIENCE_S = 60.0
"""How long to wait for a GPU to say how much memory it has."""


@ray.remote(num_cpus=0)
class DriverActor:
    """The driver of one experiment. It takes no CPU from the clients: it works while they wait."""

    @ray.method(num_returns="streaming")
    def run(self, prepared: Prepared, place: StoragePath, resume: bool) -> Iterator[Sequence[Event | FedrayError]]:
        """Yield the experiment's events, those of a moment together; a FedrayError that ends it comes as the last one,
        as itself.

        resume: begin with loading the newest intact checkpoint.
        """
        config = prepared.config
        clients = config.clients if config.device != "cpu" else without_gpus(config.clients)
        pool: ClientPool | None = None
        try:
            pool = ClientPool(clients, prepared.data.shards, prepared.cohorts())
            freeze_heap()
            yield from in_batches(run_experiment(prepared, pool, place, resume))
        except FedrayError as error:
            yield [error]
        finally:
            if pool is not None:
                pool.close()


def in_batches(events: Iterable[Event]) -> Iterator[list[Event]]:
    """Yield the events in lists: clients that finish within a moment together, everything else at once."""
    batch: list[Event] = []
    started = monotonic()
    try:
        for event in events:
            batch.append(event)
            if not isinstance(event, TasksFinished) or monotonic() - started > MOMENT_S:
                yield batch
                batch, started = [], monotonic()
    except FedrayError:
        yield batch  # what happened before
        raise


def without_gpus(clients: ClientsConfig) -> ClientsConfig:
    """Return the section with actors that ask for no GPU, for experiments on CPUs."""
    tiers = {name: tier.model_copy(update={"num_gpus": 0.0}) for name, tier in clients.tiers.items()}
    return clients.model_copy(update={"num_gpus": 0.0, "tiers": tiers})


def events(prepared: Prepared, where: str | Path | StoragePath, resume: bool = False) -> Iterator[Event]:
    """Run an experiment on the runtime that its configuration names, and yield what happens.

    Connects to the cluster that RAY_ADDRESS names or that runs on this machine, and else starts one of its own, which
    ends with the experiment. A driver that dies is started again, and continues from the newest checkpoint, unless it
    dies again before it has finished another round.

    resume: continue the run that is in the folder.

    Raises:
        FedrayError: the experiment ended; the message says why.
    """
    place = StoragePath.of(where)
    if prepared.config.runtime == "inline":
        yield from run_experiment(prepared, LocalPool(prepared.data.shards), place, resume)
        return
    own = not ray.is_initialized()
    if own:
        start_ray(include_dashboard=None if os.environ.get("RAY_ADDRESS") else False)
    try:
        shared, fruitless = ray.put(prepared), 0
        while True:
            try:
                for event in _driven(shared, place, resume):
                    fruitless = 0 if isinstance(event, RoundFinished) else fruitless
                    yield event
                return
            except _DriverDied as died:
                fruitless += 1
                if fruitless > 1 or not prepared.config.checkpoint.every:
                    raise FedrayError(f"the driver ended: {died}") from died.__cause__
                log.warning("the driver ended, and is started again: %s", died)
                resume = True
    finally:
        if own:
            ray.shutdown()


class _DriverDied(Exception):
    """And with it its actors."""


def _driven(prepared: Any, place: StoragePath, resume: bool) -> Iterator[Event]:
    """Run an experiment, given as a reference, in a driver of its own.

    Raises:
        FedrayError: the experiment ended. _DriverDied: the driver did.
    """
    driver = DriverActor.options(**on_callers_node()).remote()  # type: ignore[attr-defined]
    try:
        for ref in driver.run.remote(prepared, place, resume):
            try:
                batch = ray.get(ref)
            except RayError as error:
                raise _DriverDied(str(error).strip().splitlines()[-1]) from error
            for event in batch:
                if isinstance(event, FedrayError):
                    raise event
                yield event
    finally:
        ray.kill(driver)  # its pool's actors are its children and end with it


def running_cluster() -> Cluster:
    """Return the nodes of the cluster that RAY_ADDRESS names, and the memory of one of its GPUs, asked of that GPU.

    Raises:
        FedrayError: the cluster cannot be reached.
    """
    own = not ray.is_initialized()
    if own:
        start_ray()
    try:
        nodes = living_nodes()
        has_gpus = any(node.get("GPU", 0) > 0 for node in nodes)
        found = [ray.get(_gpu_memory.remote(), timeout=GPU_PATIENCE_S)] if has_gpus else []
        return Cluster(tuple(nodes), max(found, default=0))
    except GetTimeoutError:
        return Cluster(tuple(nodes), 0)  # all GPUs are busy
    finally:
        if own:
            ray.shutdown()


@ray.remote(num_cpus=0, num_gpus=0.0001)
def _gpu_memory() -> int:
    """0 where a GPU is only in Ray's books."""
    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else 0


def start_ray(**options: Any) -> None:
    """Connect to the cluster that RAY_ADDRESS names or that runs on this machine, or start one; quietly.

    Ray gives a node of its own 30 seconds to come up, which a busy machine does not always make: try again twice.

    options: passed on to ray.init.

    Raises:
        FedrayError: no cluster could be reached or started.
    """
    for last in (False, False, True):
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
            return
        except Exception as error:  # Ray raises a bare Exception when its node does not come up
            ray.shutdown()
            if last or "timed out" not in str(error):
                raise FedrayError(f"Ray: no cluster could be reached or started: {error}") from error
