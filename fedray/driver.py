"""DriverActor: owns the pool and the federation, and streams what happens."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import ray

from fedray.config import Config
from fedray.errors import FedrayError
from fedray.experiment import Event, run_experiment
from fedray.inline import InlinePool
from fedray.pool import ClientPool
from fedray.prepare import Prepared


@ray.remote(num_cpus=0)
class DriverActor:
    """The driver of one experiment. It takes no CPU from the clients: it works while they wait."""

    @ray.method(num_returns="streaming")
    def run(self, prepared: Prepared, path: Path) -> Iterator[Event | FedrayError]:
        """Yield the experiment's events; a FedrayError that ends it comes as the last one, as itself."""
        config = prepared.config
        cohort = config.clients.per_round or len(prepared.clients)
        pool = ClientPool(config.clients, prepared.data.shards, cohort)
        try:
            yield from run_experiment(prepared, pool, path)
        except FedrayError as error:
            yield error
        finally:
            pool.close()


def events(prepared: Prepared, path: Path) -> Iterator[Event]:
    """Run an experiment on the runtime that its configuration names, and yield what happens.

    Connects to the cluster that RAY_ADDRESS names or that runs on this machine, and else starts one of its own, which
    ends with the experiment.

    Raises:
        FedrayError: the experiment ended; the message says why.
    """
    if prepared.config.runtime == "inline":
        yield from run_experiment(prepared, InlinePool(prepared.data.shards), path)
        return
    own = not ray.is_initialized()
    if own:
        start_ray()
    try:
        driver = DriverActor.remote()  # type: ignore[attr-defined]
        try:
            for ref in driver.run.remote(ray.put(prepared), path.resolve()):
                event = ray.get(ref)
                if isinstance(event, FedrayError):
                    raise event
                yield event
        finally:
            ray.kill(driver)  # its pool's actors are its children and end with it
    finally:
        if own:
            ray.shutdown()


def start_ray() -> None:
    """Connect to Ray, quietly; local clusters start without a dashboard."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    dashboard = None if os.environ.get("RAY_ADDRESS") else False
    ray.init(log_to_driver=False, logging_level=logging.WARNING, include_dashboard=dashboard)


def default_path(config: Config, stamp: str) -> Path:
    """Return storage_path/NAME-STAMP."""
    return Path(config.storage_path).expanduser() / f"{config.name}-{stamp}"
