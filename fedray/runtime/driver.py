"""DriverActor: owns the pool and the federation, and streams the events of an experiment."""

import logging
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import ray
import torch
from ray.exceptions import ActorHandleNotFoundError, GetTimeoutError, RayError

from fedray.config import Config
from fedray.errors import FedrayError
from fedray.experiment.prepare import Prepared
from fedray.experiment.resume import continued
from fedray.experiment.run import run_experiment
from fedray.federation.events import Event, RoundFinished, TasksFinished
from fedray.federation.local_pool import LocalPool
from fedray.planning.cluster_plan import Cluster, check_device, this_machine
from fedray.runtime.address import check_address
from fedray.runtime.causes import lost_by, raised_by_code
from fedray.runtime.cluster import has_autoscaler, living_nodes, on_callers_node
from fedray.runtime.messages import Message, from_message, to_message
from fedray.runtime.pool import ClientPool
from fedray.runtime.session import check_reachable, connected, workers_ready
from fedray.storage.paths import StoragePath
from fedray.training.process_memory import freeze_heap

log = logging.getLogger(__name__)

MOMENT_S = 0.1
"""Seconds within which finished tasks share a message, because a message costs more than a small client's task."""

GPU_PATIENCE_S = 60.0
"""Seconds to wait for a GPU to report its memory."""


@ray.remote(num_cpus=0)
class DriverActor:
    """The driver of one experiment. It requests no CPU: it works while clients wait."""

    def ready(self) -> None:
        """Return once the actor has started."""

    @ray.method(num_returns="streaming")
    def run(self, message: Message, place: StoragePath, resume: bool) -> Iterator[Sequence[Event | FedrayError]]:
        """Yield the experiment's events in batches (`in_batches`). A FedrayError that ends the experiment is yielded
        last, because Ray would wrap an exception in one of its own.

        Args:
            message: contains the `Prepared` experiment.
            resume: begin by loading the newest intact checkpoint.
        """
        pool: ClientPool | None = None
        try:
            prepared: Prepared = from_message(message)
            pool = ClientPool(prepared.config.requested_clients, prepared.data.shards, prepared.cohorts())
            freeze_heap()
            yield from in_batches(run_experiment(prepared, pool, place, resume, overlap=True))
        except FedrayError as error:
            yield [error]
        finally:
            if pool is not None:
                pool.close()


def in_batches(events: Iterable[Event]) -> Iterator[list[Event]]:
    """Yield the events in lists: tasks that finish within `MOMENT_S` share a list; any other event ends its list."""
    batch: list[Event] = []
    started = monotonic()
    try:
        for event in events:
            batch.append(event)
            if not isinstance(event, TasksFinished) or monotonic() - started > MOMENT_S:
                yield batch
                batch, started = [], monotonic()
    except FedrayError:
        yield batch  # events before the error
        raise


@contextmanager
def begun(config: Config) -> Iterator[Callable[[Prepared, StoragePath, bool], Generator[Event, None, None]]]:
    """Begin to start what an experiment runs on, while its data are read: on a cluster that exists already, the driver,
    and otherwise what a new cluster's workers import.

    Yields:
        `events`, for this experiment.

    Raises:
        ConfigError: the cluster does not answer.
    """
    if config.runtime == "inline":
        yield events
    elif not check_reachable():  # starting Ray takes seconds, and the data may have mistakes
        with workers_ready():
            yield events
    else:
        with connected():
            driver = _start()
            try:
                yield partial(events, driver=driver)
            finally:
                _end(driver)


def events(
    prepared: Prepared, where: str | Path | StoragePath, resume: bool = False, driver: Any = None
) -> Generator[Event, None, None]:
    """Run an experiment on the runtime that its configuration names, and yield what happens.

    A driver that dies is started again and continues from the newest checkpoint, unless it dies again before it has
    finished another round.

    Args:
        where: the run's folder.
        resume: continue the run that is in the folder.
        driver: a `DriverActor` that has been started for this experiment.

    Raises:
        ConfigError: the cluster does not answer, or lacks the device.
        FedrayError: the experiment ended; the message says why.
    """
    place = StoragePath.of(where)
    if prepared.config.runtime == "inline":
        yield from run_experiment(prepared, LocalPool(prepared.data.shards), place, resume)
        return
    with connected():
        check_device(prepared.config, living_nodes(), has_autoscaler())
        message, fruitless = _shared(prepared), 0
        if driver is None or not _lives(driver):
            driver = _start()
        while True:
            try:
                for event in _driven(message, place, resume, driver):
                    fruitless = 0 if isinstance(event, RoundFinished) else fruitless
                    yield event
                return
            except _DriverDied as died:
                fruitless += 1
                if fruitless > 1 or not prepared.config.checkpoint.every:
                    raise FedrayError(f"the driver died: {died}") from died.__cause__
                log.warning("the driver died and is started again: %s", died)
                driver = _start()
                resume = (place / "config.yaml").is_file()
                if resume:  # with the settings that the dead driver measured
                    message = _shared(replace(prepared, config=continued(place, prepared.config)))


def _start() -> Any:
    """Return a new `DriverActor`, whose process is still starting."""
    return DriverActor.options(**on_callers_node()).remote()  # type: ignore[attr-defined]


def _lives(driver: Any) -> bool:
    """Return whether a driver has started and not died since, when it has started."""
    with suppress(RayError):
        ray.get(driver.ready.remote())
        return True
    return False


def _end(driver: Any) -> None:
    """End a driver; the pool's actors are its children and end with it. A callback may have ended the connection, and
    the driver with it."""
    if ray.is_initialized():
        with suppress(ActorHandleNotFoundError):
            ray.kill(driver)


def _shared(prepared: Prepared) -> Any:
    """Return a reference to the message from which drivers get the experiment."""
    return ray.put(to_message(prepared))


class _DriverDied(Exception):
    """The driver died, and its actors with it."""


def _driven(message: Any, place: StoragePath, resume: bool, driver: Any) -> Iterator[Event]:
    """Run an experiment, given as a reference to its message, in a driver, and end the driver.

    Raises:
        FedrayError: the experiment ended.
        _DriverDied: the driver died.
    """
    try:
        for ref in driver.run.remote(message, place, resume):
            try:
                batch = ray.get(ref)
            except RayError as error:
                if (raised := raised_by_code(error)) is not None:
                    raise FedrayError(
                        f"an exception on the driver, for example in aggregate_train: {raised}"
                    ) from error
                raise _DriverDied(lost_by(error)) from error  # or an actor of the driver
            for event in batch:
                if isinstance(event, FedrayError):
                    raise event
                yield event
    finally:
        _end(driver)


def check_cluster(config: Config) -> None:
    """Check that the cluster on which an experiment would run answers and has the experiment's device, without starting
    an actor: the cluster that RAY_ADDRESS names, or else this machine.

    Raises:
        ConfigError: the cluster does not answer, or lacks the device.
    """
    check_address()
    if config.device != "cuda":
        return
    if os.environ.get("RAY_ADDRESS", "local") == "local":
        check_device(config, this_machine().nodes, elastic=False)
        return
    with connected():
        check_device(config, living_nodes(), has_autoscaler())


def running_cluster() -> Cluster:
    """Return the nodes of the cluster that RAY_ADDRESS names, and the memory that one of its GPUs reports.

    Raises:
        ConfigError: the cluster does not answer.
        FedrayError: the cluster cannot be reached.
    """
    with connected():
        nodes = tuple(living_nodes())
        if not any(node.get("GPU", 0) > 0 for node in nodes):
            return Cluster(nodes, 0)
        try:
            return Cluster(nodes, ray.get(_gpu_memory.remote(), timeout=GPU_PATIENCE_S))
        except GetTimeoutError:  # all GPUs are busy
            return Cluster(nodes, 0)


@ray.remote(num_cpus=0, num_gpus=0.0001)
def _gpu_memory() -> int:
    """Return the bytes of a GPU's memory; 0 if the GPU exists only as a Ray resource."""
    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else 0
