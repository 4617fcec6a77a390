"""A trial as an actor of Ray Tune: it drives one experiment round by round, as `fedray.run` does."""

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any

import pandas as pd
from ray import tune

from fedray.config.sweep import METRICS
from fedray.errors import FedrayError
from fedray.experiment.prepare import prepare
from fedray.experiment.resume import continued
from fedray.experiment.run import run_experiment
from fedray.federation.events import Event, MethodFinished, RoundFinished, RunStarted
from fedray.federation.local_pool import LocalPool
from fedray.results.run_result import RunResult
from fedray.runtime.causes import first_line
from fedray.runtime.messages import from_message
from fedray.runtime.pool import ClientPool
from fedray.storage.paths import StoragePath
from fedray.sweeps.result import SweepResult
from fedray.sweeps.shared import CachedDatasets, SharedActorSource
from fedray.sweeps.space import Trial


@dataclass(frozen=True)
class SweepContext:
    """What all trials of a sweep have in common.

    Attributes:
        actors, datasets: handles of `SharedActors` and `DatasetCache`.
        concurrent: how many trials run at a time.
    """

    found: SweepResult
    actors: Any
    datasets: Any
    concurrent: int


class TrialRun:
    """One trial, which runs from result to result."""

    def __init__(self, trial: Trial, context: SweepContext):
        self._trial, self._context = trial, context
        self._experiment: Generator[Event, None, None] | None = None
        self._pool: ClientPool | None = None
        self._begun, self._rounds = monotonic(), 0
        self._metrics: Mapping[str, Any] = {}
        self._events: list[RunStarted | RoundFinished] = []

    def next_result(self) -> dict[str, Any]:
        """Run to the next result and return it. An exception of the experiment becomes a result with an error."""
        try:
            return self._result(done=self._run_to_result())
        except Exception as error:
            message = str(error) if isinstance(error, FedrayError) else f"{type(error).__name__}: {first_line(error)}"
            return self._result(error=message, done=True)

    def close(self) -> None:
        """End the experiment, finished or not, and release its actors."""
        if self._experiment is not None:
            self._experiment.close()
        if self._pool is not None:
            self._pool.close()

    def _run_to_result(self) -> bool:
        """Run until a round has the metric, or to the end; return whether the end was reached."""
        if self._experiment is None:
            self._experiment = self._started()
        for event in self._experiment:
            if isinstance(event, RunStarted | RoundFinished):
                self._events.append(replace(event, trial=self._trial.id))
            if isinstance(event, RoundFinished) and not event.final:
                self._rounds = event.server_round + 1
                self._metrics = {
                    "personalised_mean": event.personalised,
                    "aggregated_mean": event.aggregated,
                    "train_loss": event.train_loss,
                    "validation_personalised_mean": event.validation_personalised,
                    "validation_aggregated_mean": event.validation_aggregated,
                }
                last = self._rounds == self._trial.config.rounds  # only the final pass is left, which is never skipped
                if not last and self._metrics.get(self._context.found.sweep.selects_by) is not None:
                    return False
            elif isinstance(event, MethodFinished):
                self._rounds = event.summary.rounds
                whole = {name: getattr(event.summary, name) for name in METRICS if name != "train_loss"}
                self._metrics = {"train_loss": self._last_loss(), **whole}
        return True

    def _last_loss(self) -> float | None:
        """Return the training loss of the last round, which may have run before this process started."""
        rounds = RunResult.load(self._folder).rounds().query("phase == 'train'")
        loss = rounds["train_loss"].iloc[-1]
        return None if pd.isna(loss) else float(loss)

    @property
    def _folder(self) -> StoragePath:
        return self._context.found.folder(self._trial)

    def _started(self) -> Generator[Event, None, None]:
        config, context, folder = self._trial.config, self._context, self._folder
        if not config.checkpoint.every:  # an interrupted trial has no checkpoint to continue from
            folder.remove()
        resume = (folder / "config.yaml").is_file()
        prepared = prepare(continued(folder, config) if resume else config, CachedDatasets(context.datasets))
        if config.runtime == "inline":
            yield from run_experiment(prepared, LocalPool(prepared.data.shards), folder, resume)
            return
        source = SharedActorSource(context.actors, self._trial.id)
        self._pool = ClientPool(
            config.requested_clients, prepared.data.shards, prepared.cohorts(), source, context.concurrent
        )
        yield from run_experiment(prepared, self._pool, folder, resume)

    def _result(self, error: str = "", done: bool = False) -> dict[str, Any]:
        metric = self._metrics.get(self._context.found.sweep.selects_by)
        events, self._events = self._events, []
        return {
            "round": self._rounds,
            "events": events,
            "metrics": dict(self._metrics),
            "error": error,
            "seconds": monotonic() - self._begun,
            "done": done,
            **({} if metric is None else {"metric": metric}),
        }


class TrialActor(tune.Trainable):
    """Trials as Tune sees them, one after another in one actor. A step runs until a round has the metric, or to the
    end."""

    context: SweepContext
    run: TrialRun

    def setup(self, config: dict[str, Any], **given: Any) -> None:
        """Begin the first trial.

        Args:
            config: names the trial.
            given: `context`, a message that contains the sweep's `SweepContext`.

        Raises:
            ConfigError: this process cannot import a class that the sweep names.
        """
        self.context = from_message(given["context"])
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin another trial in this actor."""
        self.run.close()
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Run to the next result."""
        return self.run.next_result()

    def cleanup(self) -> None:
        """Release the trial's actors."""
        self.run.close()

    def _begin(self, config: dict[str, Any]) -> None:
        trial = next(trial for trial in self.context.found.trials if trial.id == config["trial"])
        self.run = TrialRun(trial, self.context)
