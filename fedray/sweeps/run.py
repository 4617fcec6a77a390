"""`fedray.sweep`: many experiments on one cluster, as trials of Ray Tune.

Tune decides which trial runs when and which ends early. A trial is a Tune actor, used again for the next one; it drives
an experiment as `fedray.run` does, round by round, with client actors and data that all trials share (`lending`).
What became of each is in the sweep's own folder; of Tune nothing is kept.
"""

import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import pandas as pd
import ray
from ray import tune
from ray.tune.error import TuneError
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import sample

from fedray.config import Config, SweepConfig, load_sweep
from fedray.config.sweep import OF_THE_WHOLE, PER_ROUND
from fedray.errors import ConfigError, FedrayError
from fedray.experiment.prepare import prepare
from fedray.experiment.resume import continued, new_place
from fedray.experiment.run import run_experiment
from fedray.experiment.run_folder import lock_folder
from fedray.federation.events import Event, MethodFinished, RoundFinished
from fedray.federation.local_pool import LocalPool
from fedray.planning.placement import Amounts, fit_times, requests
from fedray.results.run_result import RunResult
from fedray.runtime.actor_group import first_line
from fedray.runtime.cluster import check_room, has_autoscaler, living_nodes, on_callers_node
from fedray.runtime.driver import start_ray, without_gpus
from fedray.runtime.pool import ClientPool
from fedray.storage.paths import StoragePath, resolve_storage
from fedray.sweeps.shared import CachedDatasets, DatasetCache, SharedActors, SharedActorSource
from fedray.sweeps.trials import (
    Ended,
    SweepEvent,
    SweepResult,
    Trial,
    TrialEnded,
    TrialRound,
    begin,
    more_is_better,
    resumed,
    trials_of,
)

MOST_TRIALS = 64
"""At a time, where nobody says otherwise."""

TUNE_FOLDER = ".tune"
"""Tune's own files, while it runs."""

HEAD = "node:__internal_head__"
"""A resource of the head node: 1."""

TUNE_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # files per trial that nobody reads
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that failed has no metric
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


@dataclass(frozen=True)
class Shared:
    """What all trials have in common. sharers: how many there are at a time."""

    found: SweepResult
    lender: Any
    shelf: Any
    sharers: int


def sweep(
    base: Config | Mapping[str, Any] | str | Path,
    space: Mapping[str, Any],
    *,
    num_samples: int = 1,
    metric: str = "personalised_mean",
    mode: str | None = None,
    scheduler: Any = None,
    max_concurrent: int | None = None,
    name: str = "sweep",
    draws_seed: int = 0,
    output: str | Path | None = None,
    resume: str | Path | None = None,
    on_event: Callable[[SweepEvent], None] | None = None,
) -> SweepResult:
    """Run one experiment for every point of a space, and wait for all of them.

    base: the experiment around which the space is: a YAML file's path, a mapping, or a Config.
    space: values by dotted path, see `SweepConfig.space`; Tune's `uniform`, `loguniform`, `randint`, `choice` and
    `grid_search` are understood too. num_samples, metric, mode, scheduler, max_concurrent, name, draws_seed: as in
    `SweepConfig`. output: the sweep's folder, which must be empty or not exist; default storage_path/NAME-TIME.
    resume: the folder of a sweep that ended early instead: what has ended stays, what had begun goes on from its
    checkpoint. on_event: called with every round and every end of a trial.

    A trial that fails is kept with its error, and the others go on.

    Raises:
        ConfigError: the sweep does not fit together, whatever of it can be known before any actor starts.

    >>> found = sweep("jobs/quickstart.yaml", {"method": ["fedavg", "fedalt"], "seed": [0, 1]})   # doctest: +SKIP
    >>> found.over_seeds()                                                                        # doctest: +SKIP
    """
    given = {
        "name": name,
        "base": base if isinstance(base, str) else str(base) if isinstance(base, Path) else base,
        "space": {path: _plain_values(path, values) for path, values in space.items()},
        "num_samples": num_samples,
        "metric": metric,
        "mode": mode,
        "scheduler": scheduler,
        "max_concurrent": max_concurrent,
        "draws_seed": draws_seed,
    }
    return run_trials(resolve_sweep(load_sweep(given), output, resume), on_event or (lambda event: None))


def resolve_sweep(asked: SweepConfig, output: str | Path | None, resume: str | Path | None) -> SweepResult:
    """Check a sweep, and return it as new, or as the folder has it of one that is continued.

    Raises:
        ConfigError, StateError: it cannot be run or continued.
    """
    trials = trials_of(asked)
    prepare(trials[0].config)  # data and model, as far as all trials have them in common
    if resume is not None:
        if output is not None:
            raise ConfigError("output: a sweep that is continued stays in its folder; leave out --output")
        return resumed(StoragePath.of(resolve_storage(resume)), asked)
    named = trials[0].config.model_copy(update={"name": asked.name})
    return SweepResult(new_place(named, output), asked, trials, {})


def run_trials(found: SweepResult, tell: Callable[[SweepEvent], None]) -> SweepResult:
    """Run the trials that have not ended, write the folder as they end, and return what the sweep found.

    tell: called with every event.

    Raises:
        ConfigError: the cluster has no room for so many at a time.
    """
    lock, own = lock_folder(found.place), not ray.is_initialized()
    actors: list[Any] = []
    try:
        found = found.reread()
        if not (waiting := found.waiting):
            return found
        with _environment(TUNE_SETTINGS):
            if own:
                start_ray(include_dashboard=None if os.environ.get("RAY_ADDRESS") else False)
            concurrent = _concurrent(found.sweep, waiting)
            begin(found)
            kinds: list[Any] = [SharedActors, DatasetCache]
            actors = [kind.options(**on_callers_node()).remote() for kind in kinds]
            listener = _Listener(found, actors[0], tell)
            _tune(waiting, Shared(found, actors[0], actors[1], concurrent), listener)
            return listener.found
    finally:
        for actor in actors:
            ray.kill(actor)
        if own:
            ray.shutdown()
        with suppress(OSError):
            (found.place / TUNE_FOLDER).remove()
        if lock is not None:
            lock.release()


def _tune(waiting: Sequence[Trial], shared: Shared, listener: "_Listener") -> None:
    """Let Tune run the trials."""
    asked, config, place = shared.found.sweep, waiting[0].config, shared.found.place
    # A trial that only drives takes no CPU; Tune wants it to ask for something, and the head is where drivers belong.
    needs = {"cpu": config.clients.num_cpus or 1} if config.runtime == "inline" else {HEAD: 0.001}
    running = tune.with_resources(tune.with_parameters(Running, shared=shared), needs)
    stopping = None
    if (asha := asked.scheduler) is not None:
        stopping = ASHAScheduler(
            time_attr="round",
            metric="metric",
            mode="max" if more_is_better(asked, config) else "min",
            max_t=max(trial.config.rounds for trial in waiting) + 1,  # the end is the experiment's own
            grace_period=asha.grace_rounds,
            reduction_factor=asha.reduction_factor,
        )
    tuner = tune.Tuner(
        running,
        param_space={"trial": tune.grid_search([trial.id for trial in waiting])},
        tune_config=tune.TuneConfig(
            scheduler=stopping, max_concurrent_trials=shared.sharers, reuse_actors=True, trial_dirname_creator=_id
        ),
        run_config=tune.RunConfig(
            name=TUNE_FOLDER,
            storage_path=place.path,
            storage_filesystem=place.filesystem,
            verbose=0,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # a trial's folder has its own
            callbacks=[listener],
        ),
    )
    try:
        tuner.fit()
    except TuneError as error:
        raise listener.raised or FedrayError(f"the sweep ended: {first_line(error)}") from error


def _id(trial: Any) -> str:
    id: str = trial.config["trial"]
    return id


def _concurrent(asked: SweepConfig, trials: Sequence[Trial]) -> int:
    """Return how many trials run at a time: so many that each can have its client actors.

    Raises:
        ConfigError: there is no room for that many, or for a single one.
    """
    nodes, elastic, fewest = living_nodes(), has_autoscaler(), MOST_TRIALS
    for config in {repr(trial.config.clients): trial.config for trial in trials}.values():
        clients = config.clients if config.device != "cpu" else without_gpus(config.clients)
        tiers = clients.tier_names if config.runtime == "ray" else clients.tier_names[:1]
        amounts = requests(clients, tiers, nodes)
        workers = {tier: clients.tier(tier).workers for tier in tiers}
        if not elastic:
            check_room(amounts, nodes, workers)
        sizes = {tier: (clients.tier(tier).actors or 1) if config.runtime == "ray" else 1 for tier in tiers}
        fewest = min(fewest, _copies(amounts, sizes, nodes, workers))
    if not elastic and asked.max_concurrent is not None and asked.max_concurrent > fewest:
        raise ConfigError(
            f"max_concurrent: {asked.max_concurrent}, but the cluster has room for {fewest} trials at a time, each "
            "with its client actors; lower it, or clients.num_cpus (it may be a fraction)"
        )
    return min(asked.max_concurrent or fewest, len(trials))


def _copies(
    asked: Mapping[str, Amounts], sizes: Mapping[str, int], nodes: Sequence[Amounts], workers: Mapping[str, int]
) -> int:
    """Return how many times so many actors of each tier find room; at least 1."""
    number = 1
    while number < MOST_TRIALS and fit_times(asked, sizes, number + 1, nodes, workers):
        number += 1
    return number


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Set variables of the environment that are not set, for a while."""
    mine = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(mine)
    try:
        yield
    finally:
        for name in mine:
            os.environ.pop(name, None)


def _plain_values(path: str, values: Any) -> Any:
    """Return Tune's ranges as the configuration writes them.

    Raises:
        ConfigError: one that it has no word for.
    """
    if isinstance(values, Mapping) and set(values) == {"grid_search"}:
        return list(values["grid_search"])
    if not isinstance(values, sample.Domain):
        return values
    sampler = values.get_sampler()  # type: ignore[no-untyped-call]
    if isinstance(values, sample.Categorical) and isinstance(sampler, sample.Uniform):
        return {"choice": list(values.categories)}
    if isinstance(values, sample.Float) and isinstance(sampler, sample.Uniform | sample.LogUniform):
        kind = "uniform" if isinstance(sampler, sample.Uniform) else "loguniform"
        return {kind: [values.lower, values.upper]}
    if isinstance(values, sample.Integer) and isinstance(sampler, sample.Uniform):
        return {"randint": [values.lower, values.upper]}
    raise ConfigError(f"space.{path}: {values!r} is not supported; allowed: uniform, loguniform, randint, choice")


class Driven:
    """One trial on its way, result by result."""

    def __init__(self, trial: Trial, shared: Shared):
        self._trial, self._shared = trial, shared
        self._experiment: Generator[Event, None, None] | None = None
        self._pool: ClientPool | None = None
        self._begun, self._rounds = monotonic(), 0
        self._metrics: Mapping[str, Any] = {}

    def go_on(self) -> dict[str, Any]:
        """Return the next result. Whatever the experiment raises is a result too."""
        try:
            return self._result(done=self._until_result())
        except Exception as error:
            message = str(error) if isinstance(error, FedrayError) else f"{type(error).__name__}: {first_line(error)}"
            return self._result(error=message, done=True)

    def close(self) -> None:
        """End it, wherever it is, and give back what was borrowed."""
        if self._experiment is not None:
            self._experiment.close()
        if self._pool is not None:
            self._pool.close()

    def _until_result(self) -> bool:
        """Go on until a round has the metric, or to the end; return whether this is the end."""
        if self._experiment is None:
            self._experiment = self._started()
        for event in self._experiment:
            if isinstance(event, RoundFinished) and not event.final:
                self._rounds = event.server_round + 1
                values = (event.personalised, event.aggregated, event.train_loss)
                self._metrics = dict(zip(PER_ROUND, values, strict=True))
                last = self._rounds == self._trial.config.rounds  # then only the final pass is left: nobody ends it
                if not last and self._metrics.get(self._shared.found.sweep.metric) is not None:
                    return False
            elif isinstance(event, MethodFinished):
                self._rounds = event.summary.rounds
                whole = {name: getattr(event.summary, name) for name in (*PER_ROUND[:2], *OF_THE_WHOLE)}
                self._metrics = {"train_loss": self._last_loss(), **whole}
        return True

    def _last_loss(self) -> float | None:
        """Return the last round's, also if that was trained before this process began."""
        rounds = RunResult.load(self._place).rounds().query("phase == 'train'")
        loss = rounds["train_loss"].iloc[-1]
        return None if pd.isna(loss) else float(loss)

    @property
    def _place(self) -> StoragePath:
        return self._shared.found.folder(self._trial)

    def _started(self) -> Generator[Event, None, None]:
        config, shared, place = self._trial.config, self._shared, self._place
        if not config.checkpoint.every:  # what had begun has nothing to go on from
            place.remove()
        resume = (place / "config.yaml").is_file()
        prepared = prepare(continued(place, config) if resume else config, CachedDatasets(shared.shelf))
        if config.runtime == "inline":
            yield from run_experiment(prepared, LocalPool(prepared.data.shards), place, resume)
            return
        clients = config.clients if config.device != "cpu" else without_gpus(config.clients)
        source = SharedActorSource(shared.lender, self._trial.id)
        self._pool = ClientPool(clients, prepared.data.shards, prepared.cohorts(), source, shared.sharers)
        yield from run_experiment(prepared, self._pool, place, resume)

    def _result(self, error: str = "", done: bool = False) -> dict[str, Any]:
        metric = self._metrics.get(self._shared.found.sweep.metric)
        return {
            "round": self._rounds,
            "metrics": dict(self._metrics),
            "error": error,
            "seconds": monotonic() - self._begun,
            "done": done,
            **({} if metric is None else {"metric": metric}),
        }


class Running(tune.Trainable):
    """Trials as Tune sees them, one after another in one actor: a step is a round that has the metric, or the end."""

    shared: Shared
    driven: Driven

    def setup(self, config: dict[str, Any], **given: Any) -> None:
        """given: `shared`."""
        self.shared = given["shared"]
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin another trial in this actor."""
        self.driven.close()
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Go on to the next result."""
        return self.driven.go_on()

    def cleanup(self) -> None:
        """Give back what was borrowed."""
        self.driven.close()

    def _begin(self, config: dict[str, Any]) -> None:
        trial = next(trial for trial in self.shared.found.trials if trial.id == config["trial"])
        self.driven = Driven(trial, self.shared)


class _Listener(tune.Callback):
    """Writes what becomes of the trials, and tells it.

    tell: called with every event. raised: what it raised.
    """

    raised: Exception | None

    def __init__(self, found: SweepResult, lender: Any, tell: Callable[[SweepEvent], None]):
        self.found, self.raised, self._lender = found, None, lender
        self._call = tell

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles what it would restore a sweep from, which it never does here."""
        return {}

    def _tell(self, event: SweepEvent) -> None:
        try:
            self._call(event)
        except Exception as error:  # Tune would hide it in one of its own
            self.raised = error
            raise

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        if (metric := result.get("metric")) is not None and not result.get("done"):
            self._tell(TrialRound(trial.config["trial"], result["round"], metric))

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        result = trial.last_result
        error = result.get("error", "")
        whole = "wall_seconds" in result.get("metrics", {})
        self._ended(trial, "failed" if error else "finished" if whole else "stopped", result, error)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._lender.reclaim.remote(trial.config["trial"])
        self._ended(trial, "lost", trial.last_result, f"its process ended: {trial.get_error()}")

    def _ended(self, trial: Any, status: Any, result: Mapping[str, Any], error: str) -> None:
        id = trial.config["trial"]
        metrics = {} if status in ("failed", "lost") else result["metrics"]
        ended = Ended(id, status, result.get("round", 0), metrics, error, result.get("seconds", 0.0))
        self.found = self.found.with_ended(ended)
        self.found.write()
        self._tell(TrialEnded(next(one for one in self.found.trials if one.id == id), ended))
