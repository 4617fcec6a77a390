"""The Python API: `fedray.run` runs one experiment, `fedray.load` opens one of its models."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from transformers import PreTrainedModel

from fedray.config import Config, load_config
from fedray.experiment.callbacks import build_callbacks, check_trackers, notifying
from fedray.experiment.prepare import prepare
from fedray.experiment.restore import restore
from fedray.experiment.resume import resolve_run
from fedray.federation.events import Callback, RunFinished
from fedray.report.document import Report
from fedray.report.files import write_after
from fedray.results.run_result import RunResult
from fedray.runtime.driver import begun
from fedray.storage.paths import StoragePath
from fedray.types import ClientId

SECTIONS = tuple(
    name
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
)
"""Fields of the configuration that are sections with fields of their own."""


def run(
    config: Config | Mapping[str, Any] | str | Path,
    *,
    output: str | Path | None = None,
    resume: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
    **overrides: Any,
) -> RunResult:
    """Run an experiment, and wait until it has finished.

    Args:
        config: the path of a YAML file, a mapping, or a Config.
        output: folder of the run, which must be empty or not exist; default storage_path/NAME-TIME.
        resume: folder of a run to continue instead, with the same configuration and possibly more rounds.
        callbacks: receive the events of the run, as do `callbacks` and `tracking` of the configuration.
        overrides: values of fields, as `rounds=10`, `train={"lr": 1e-3}` or `**{"train.lr": 1e-3}`.

    Returns:
        The result, read from the run's folder.

    Raises:
        ConfigError: the experiment has a mistake. It is raised before any client actor starts, except for what only the
            cluster's nodes know (room for actors, a folder that all of them see).
        FedrayError: the run ended early; the message says why.

    Examples:
        >>> result = run("jobs/quickstart.yaml", rounds=2)      # doctest: +SKIP
        >>> result["fedalt"].personalised_mean                  # doctest: +SKIP
    """
    loaded, place = resolve_run(load_config(config, dict(_dotted(overrides))), output, resume)
    return execute(loaded, place, resume is not None, callbacks)


def execute(config: Config, place: StoragePath, resume: bool = False, callbacks: Sequence[Callback] = ()) -> RunResult:
    """Check an experiment, run it in its folder, and return its result.

    Args:
        config, place: as `resolve_run` returned them.
        resume: whether to continue the run that is in the folder.
        callbacks: receive the events of the run, as do `callbacks` and `tracking` of the configuration.

    Raises:
        FedrayError: as `run`.
    """
    try:
        check_trackers(config, place)
        with begun(config) as events:
            prepared = prepare(config)  # first: a callback may begin something of its own
            with notifying([*build_callbacks(config), *callbacks], partial(RunFinished, place)) as notify:
                with closing(events(prepared, place, resume)) as happening:
                    for event in happening:
                        notify(event)
                result = RunResult.load(place)
                if config.report:
                    write_after(partial(_report, result), place)  # before the trackers' end, which attach it
                return result
    except BaseException:
        place.remove_if_empty()  # nothing has been trained
        raise


def load(
    run: str | Path | StoragePath, method: str | None = None, client: ClientId | None = None, device: str | None = None
) -> PreTrainedModel:
    """Return a model of a finished run, ready for inference.

    Args:
        run: the run's folder.
        method: its name or label in the run; may be left out if there is one only.
        client: whose model, as its last local training left it; None: the server's own.
        device: cuda or cpu; default what the configuration says, with this machine's devices.

    Raises:
        ConfigError: there is no such method or client, or the server has no model of its own.
        StateError: the run has not finished, or its files are missing or damaged.
    """
    return restore(run, method, client, device=device).model


def _report(result: RunResult) -> Report:
    from fedray.report.build import report_of  # imports scipy, which running does not need

    return report_of([result])


def _dotted(overrides: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield overrides as dotted paths, so that train={"lr": 1e-3} changes one field of its section and keeps the
    others."""
    for name, value in overrides.items():
        if isinstance(value, Mapping) and name in SECTIONS:
            yield from ((f"{name}.{field}", entry) for field, entry in value.items())
        else:
            yield name, value
