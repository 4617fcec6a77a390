"""`fedray.sweep`: many experiments on one cluster, as trials of Ray Tune.

Tune decides when each trial runs and which trials end early. The results of the trials are in the sweep's own folder;
none of Tune's files are kept.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.error import TuneError
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import sample

from fedray.config import Config, SweepConfig, load_sweep, to_mapping
from fedray.config.tracker import EndStatus
from fedray.errors import ConfigError, FedrayError, StorageError
from fedray.experiment.callbacks import build_callbacks, check_trackers, notifying
from fedray.experiment.prepare import prepare
from fedray.experiment.resume import new_place, with_absolute_paths
from fedray.experiment.run_folder import lock_folder
from fedray.federation.events import Callback, SweepFinished, SweepStarted
from fedray.planning.cluster_plan import check_device
from fedray.planning.placement import Amounts, fit_times, requests
from fedray.report.files import write_after
from fedray.runtime.causes import first_line, raised_by_code
from fedray.runtime.cluster import check_room, has_autoscaler, living_nodes, on_callers_node
from fedray.runtime.messages import to_message
from fedray.runtime.session import check_reachable, connected
from fedray.storage.paths import StoragePath, resolve_storage
from fedray.sweeps.page import result_report
from fedray.sweeps.result import SweepResult, TrialFinished, TrialResult, begin, more_is_better, resumed
from fedray.sweeps.shared import DatasetCache, SharedActors
from fedray.sweeps.space import Trial, trials_of
from fedray.sweeps.trial_actor import SweepContext, TrialActor

MAX_TRIALS = 64
"""Most trials at a time if `max_concurrent` is not set."""

TUNE_FOLDER = ".tune"
"""Folder of Tune's own files while it runs."""

HEAD = "node:__internal_head__"
"""A resource of which the head node has 1."""

TUNE_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # they write files per trial that fedray does not read
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that failed has no metric
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


def sweep(
    base: Config | Mapping[str, Any] | str | Path,
    space: Mapping[str, Any],
    *,
    num_samples: int = 1,
    metric: str = "personalised_mean",
    select_on: str = "validation",
    mode: str | None = None,
    scheduler: Any = None,
    max_concurrent: int | None = None,
    name: str = "sweep",
    draws_seed: int = 0,
    output: str | Path | None = None,
    resume: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
) -> SweepResult:
    """Run one experiment for every point of a space, and wait for all of them.

    A trial that fails is kept with its error, and the others continue.

    Args:
        base: the experiment that each point of the space changes: the path of a YAML file, a mapping, or a Config.
        space: values by dotted path, see `SweepConfig.space`; Tune's `uniform`, `loguniform`, `randint`, `choice` and
            `grid_search` are accepted too.
        num_samples, metric, select_on, mode, scheduler, max_concurrent, name, draws_seed: as in `SweepConfig`.
        output: the sweep's folder, which must be empty or not exist; default storage_path/NAME-TIME.
        resume: the folder of an interrupted sweep to continue instead: finished trials stay, the others continue from
            their checkpoints.
        callbacks: receive the events of the sweep and of its trials (`Callback`).

    Raises:
        ConfigError: the sweep has a mistake that can be found before any actor starts.

    Examples:
        >>> found = sweep("jobs/quickstart.yaml", {"method": ["fedavg", "fedalt"], "seed": [0, 1]})   # doctest: +SKIP
        >>> found.over_seeds()                                                                        # doctest: +SKIP
    """
    given = {
        "name": name,
        "base": base if isinstance(base, str) else str(base) if isinstance(base, Path) else base,
        "space": {path: _plain_values(path, values) for path, values in space.items()},
        "num_samples": num_samples,
        "metric": metric,
        "select_on": select_on,
        "mode": mode,
        "scheduler": scheduler,
        "max_concurrent": max_concurrent,
        "draws_seed": draws_seed,
    }
    return run_trials(resolve_sweep(load_sweep(given), output, resume), callbacks)


def resolve_sweep(given: SweepConfig, output: str | Path | None, resume: str | Path | None) -> SweepResult:
    """Check a sweep; return it without results, or with those of its folder if it is continued.

    Args:
        output: folder of a new sweep; None means storage_path/NAME-TIME.
        resume: folder of a sweep to continue instead.

    Raises:
        ConfigError: the sweep cannot be run, or the folder is that of another sweep.
        StateError: the folder is not that of a sweep.
    """
    check_reachable()
    trials = trials_of(given)
    prepared = prepare(trials[0].config)  # data and model, as far as all trials have them in common
    if given.selects_by != given.metric and not any(
        s.num_examples("validation") for s in prepared.data.shards.values()
    ):
        raise ConfigError(
            f"metric: {given.metric} is compared on validation examples, and there are none; set "
            "partition.validation_fraction above 0, or select_on: test"
        )
    if resume is not None:
        if output is not None:
            raise ConfigError("output: a sweep that is continued stays in its folder; leave out --output")
        return _with_absolute_paths(resumed(StoragePath.of(resolve_storage(resume)), given))
    named = trials[0].config.model_copy(update={"name": given.name})
    return _with_absolute_paths(SweepResult(new_place(named, output), given, trials, {}))


def _with_absolute_paths(found: SweepResult) -> SweepResult:
    """Return the sweep with absolute paths in its trials, which run in other processes."""
    trials = [replace(trial, config=with_absolute_paths(trial.config)) for trial in found.trials]
    return replace(found, trials=tuple(trials))


def run_trials(found: SweepResult, callbacks: Sequence[Callback] = ()) -> SweepResult:
    """Run the trials that have not ended, write the folder whenever one ends, and return the sweep's result.

    Args:
        callbacks: receive the events of the sweep and of its trials, as do those that the base experiment names.

    Raises:
        ConfigError: the cluster has no room for this many trials at a time.
    """
    check_trackers(found.trials[0].config, found.place)
    everyone = [*build_callbacks(found.trials[0].config), *callbacks]
    lock = lock_folder(found.place)
    try:
        found = found.reread()
        if not (waiting := found.waiting):
            return found
        with _environment(TUNE_SETTINGS), connected():
            nodes, elastic = living_nodes(), has_autoscaler()
            for trial in waiting:
                if trial.config.runtime == "ray":
                    check_device(trial.config, nodes, elastic)
            concurrent = _concurrent(found.sweep, waiting)
            begin(found)
            kinds: list[Any] = [SharedActors, DatasetCache]
            actors = [kind.options(**on_callers_node()).remote() for kind in kinds]
            try:
                listener = _Listener(found, actors[0], everyone)
                with notifying(everyone, listener.finished) as notify:
                    notify(SweepStarted(found.place, to_mapping(found.sweep)))
                    _tune(waiting, SweepContext(found, actors[0], actors[1], concurrent), listener)
                    done = listener.found
                    if done.trials[0].config.report:
                        write_after(lambda: result_report([done]), done.place)  # before the trackers' end
                return done
            finally:
                for actor in actors:
                    ray.kill(actor)
    finally:
        with suppress(StorageError):
            (found.place / TUNE_FOLDER).remove()
        if lock is not None:
            lock.release()


def _tune(waiting: Sequence[Trial], context: SweepContext, listener: "_Listener") -> None:
    """Run the trials with Tune."""
    sweep, config, place = context.found.sweep, waiting[0].config, context.found.place
    # A trial that only drives needs no CPU. Tune requires some request, and drivers belong on the head node.
    needs = {"cpu": config.clients.num_cpus or 1} if config.runtime == "inline" else {HEAD: 0.001}
    running = tune.with_resources(tune.with_parameters(TrialActor, context=to_message(context)), needs)
    stopping = None
    if (asha := sweep.scheduler) is not None:
        stopping = ASHAScheduler(
            time_attr="round",
            metric="metric",
            mode="max" if more_is_better(sweep, config) else "min",
            max_t=max(trial.config.rounds for trial in waiting) + 1,  # the experiment itself ends the trial
            grace_period=asha.grace_rounds,
            reduction_factor=asha.reduction_factor,
        )
    tuner = tune.Tuner(
        running,
        param_space={"trial": tune.grid_search([trial.id for trial in waiting])},
        tune_config=tune.TuneConfig(
            scheduler=stopping, max_concurrent_trials=context.concurrent, reuse_actors=True, trial_dirname_creator=_id
        ),
        run_config=tune.RunConfig(
            name=TUNE_FOLDER,
            storage_path=place.path,
            storage_filesystem=place.filesystem,
            verbose=0,
            checkpoint_config=tune.CheckpointConfig(
                checkpoint_at_end=False
            ),  # a trial's folder has checkpoints of its own
            callbacks=[listener],
        ),
    )
    try:
        tuner.fit()
    except (TuneError, OSError) as error:  # Tune does not wrap what it meets when it writes its own files
        raise listener.raised or FedrayError(f"{place}: the sweep ended: {first_line(error)}") from error


def _id(trial: Any) -> str:
    id: str = trial.config["trial"]
    return id


def _concurrent(given: SweepConfig, trials: Sequence[Trial]) -> int:
    """Return how many trials run at a time, so that each can have its client actors.

    Raises:
        ConfigError: the cluster has no room for `max_concurrent` trials, or for a single one.
    """
    nodes, elastic, fewest = living_nodes(), has_autoscaler(), MAX_TRIALS
    for config in {repr(trial.config.clients): trial.config for trial in trials}.values():
        clients = config.requested_clients
        tiers = clients.tier_names if config.runtime == "ray" else clients.tier_names[:1]
        amounts = requests(clients, tiers, nodes)
        workers = {tier: clients.tier(tier).workers for tier in tiers}
        if not elastic:
            check_room(amounts, nodes, workers)
        sizes = {tier: (clients.tier(tier).actors or 1) if config.runtime == "ray" else 1 for tier in tiers}
        fewest = min(fewest, _copies(amounts, sizes, nodes, workers))
    if not elastic and given.max_concurrent is not None and given.max_concurrent > fewest:
        raise ConfigError(
            f"max_concurrent: {given.max_concurrent}, but the cluster has room for {fewest} trials at a time, each "
            "with its client actors; lower it, or clients.num_cpus (it may be a fraction)"
        )
    return min(given.max_concurrent or fewest, len(trials))


def _copies(
    requested: Mapping[str, Amounts], sizes: Mapping[str, int], nodes: Sequence[Amounts], workers: Mapping[str, int]
) -> int:
    """Return how many pools with `sizes` actors of each tier fit at the same time; at least 1."""
    number = 1
    while number < MAX_TRIALS and fit_times(requested, sizes, number + 1, nodes, workers):
        number += 1
    return number


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables that are not set yet, within the block."""
    mine = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(mine)
    try:
        yield
    finally:
        for name in mine:
            os.environ.pop(name, None)


def _plain_values(path: str, values: Any) -> Any:
    """Return Tune's ranges in the form of the configuration.

    Raises:
        ConfigError: the configuration does not support the range.
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


class _Listener(tune.Callback):
    """Writes the results of trials to the sweep's folder, and notifies the callbacks.

    Attributes:
        found: the sweep's result so far.
        raised: the exception that a callback or the code of a trial's actor raised, or that the folder cannot be
            written, if any.
    """

    raised: Exception | None

    def __init__(self, found: SweepResult, shared_actors: Any, callbacks: Sequence[Callback]):
        self.found, self.raised, self._shared_actors, self._callbacks = found, None, shared_actors, callbacks

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Tune pickles the listener to restore a sweep, which fedray does in its own way."""
        return {}

    def finished(self, status: EndStatus, error: str) -> SweepFinished:
        """Return the event of the sweep's end."""
        return SweepFinished(self.found.place, status, error, self.found.to_pandas().to_dict("records"))

    def _notify(self, event: Any) -> None:
        try:
            for callback in self._callbacks:
                callback.on_event(event)
        except Exception as error:  # Tune would wrap it in an exception of its own
            self.raised = error
            raise

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        for event in result["events"]:
            self._notify(event)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        result = trial.last_result
        error = result.get("error", "")
        whole = "wall_seconds" in result.get("metrics", {})
        self._finished(trial, "failed" if error else "finished" if whole else "stopped", result, error)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._shared_actors.reclaim.remote(trial.config["trial"])
        error = trial.get_pickled_error()
        if error is not None and (raised := raised_by_code(error)) is not None:  # by every other trial's actor, too
            self.raised = FedrayError(f"a trial's actor cannot be set up: {raised}")
            raise self.raised
        self._finished(trial, "lost", trial.last_result, f"its process ended: {trial.get_error()}")

    def _finished(self, trial: Any, status: Any, result: Mapping[str, Any], error: str) -> None:
        id = trial.config["trial"]
        metrics = {} if status in ("failed", "lost") else result["metrics"]
        ended = TrialResult(id, status, result.get("round", 0), metrics, error, result.get("seconds", 0.0))
        self.found = self.found.with_result(ended)
        try:
            self.found.write()
        except StorageError as error:
            self.raised = error
            raise
        self._notify(TrialFinished(next(one for one in self.found.trials if one.id == id), ended))
