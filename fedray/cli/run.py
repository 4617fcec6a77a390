"""fedray run, fedray sweep: experiments from this process."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from fedray.cli.console import (
    ConfigPath,
    Overrides,
    begun_apart,
    command_line,
    ended_by_sigterm,
    fail,
    how_interrupted,
    open_console,
    read_config,
    read_sweep,
    reported,
)
from fedray.errors import ConfigError, FedrayError

if TYPE_CHECKING:
    from fedray.results.comparison import Comparison
    from fedray.storage.paths import StoragePath

Output = Annotated[str | None, typer.Option(help="Folder of the results, a path or a URI; must be empty or not exist.")]
Resume = Annotated[
    str | None, typer.Option(help="Folder of a run that was interrupted, or that is to have more rounds.")
]
OrResume = Annotated[bool, typer.Option("--or-resume", help="Continue what is in --output, if there is anything.")]


def run(
    context: typer.Context,
    config: ConfigPath,
    overrides: Overrides = None,
    output: Output = None,
    resume: Resume = None,
    or_resume: OrResume = False,
) -> None:
    """Run an experiment: train every method, show progress, write the results."""
    console = open_console()
    with reported(), ended_by_sigterm():
        with begun_apart(context, config) as run_apart:
            loaded = read_config(config, overrides)
            if loaded.runtime == "ray":
                run_apart()
        from fedray.api import execute
        from fedray.evaluation.metrics import configured_metrics
        from fedray.experiment.resume import resolve_run
        from fedray.results.memory_report import measured_table
        from fedray.results.report import LiveProgress, summary_table
        from fedray.results.score_tables import further_scores

        output, resume = _resumed_if_there(output, resume, or_resume, "config.yaml")
        loaded, place = resolve_run(loaded, output, resume)
        console.print("reading data and model configuration ...", highlight=False)
        metric = configured_metrics(loaded)[0]
        try:
            with LiveProgress(console, metric) as progress:
                result = execute(loaded, place, resume is not None, [progress])
        except KeyboardInterrupt as error:
            again = command_line("run", config, overrides, "--resume", str(place))
            how, code = how_interrupted(error)
            fail(f"{how}; to continue: {again}", code)
        comparison, why_not = _compared(result.compare)
        console.print(summary_table(result.summaries, metric, comparison))
        if why_not and len(result.summaries) > 1:
            console.print(why_not, style="yellow", highlight=False, markup=False, soft_wrap=True)
        if (further := further_scores(result.scores(), configured_metrics(loaded))) is not None:
            console.print(further)
        console.print(measured_table(result.memory().to_dict("records")))
        console.print(f"results: {place}", highlight=False, soft_wrap=True)
        _print_report(console, place, loaded.report)


def sweep(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="YAML file of the sweep.", metavar="SWEEP", show_default=False)],
    overrides: Overrides = None,
    output: Annotated[str | None, typer.Option(help="Folder of the sweep; must be empty or not exist.")] = None,
    resume: Annotated[str | None, typer.Option(help="Folder of a sweep that was interrupted.")] = None,
    or_resume: OrResume = False,
) -> None:
    """Run an experiment for every point of a space on one cluster, and compare them."""
    console = open_console()
    with reported(), ended_by_sigterm():
        with begun_apart(context, config) as run_apart:
            loaded = read_sweep(config, overrides)
            run_apart()
        from fedray.results.comparison_tables import sheets
        from fedray.results.sheets import rich_tables
        from fedray.sweeps.report import SweepProgress, sweep_table
        from fedray.sweeps.run import resolve_sweep, run_trials

        output, resume = _resumed_if_there(output, resume, or_resume, "sweep.yaml")
        found = resolve_sweep(loaded, output, resume)
        console.print(f"{len(found.trials)} trials", highlight=False)
        try:
            with SweepProgress(console, found) as progress:
                found = run_trials(found, [progress])
        except KeyboardInterrupt as error:
            again = command_line("sweep", config, overrides, "--resume", str(found.place))
            how, code = how_interrupted(error)
            fail(f"{how}; to continue: {again}", code)
        console.print(sweep_table(found))
        if len({trial.method for trial in found.trials}) > 1 and found.best is not None:
            comparison, why_not = _compared(found.compare)
            console.print(rich_tables(sheets(comparison)) if comparison else escape(why_not))
        console.print(f"results: {found.place}", highlight=False, soft_wrap=True)
        _print_report(console, found.place, found.trials[0].config.report)
        if found.best is None:
            fail("no trial finished; trials.parquet has the errors", 1)


def _print_report(console: Console, place: "StoragePath", wanted: bool) -> None:
    """Print where the report is, if there is one."""
    from fedray.report.files import NAME

    if wanted and (file := place / NAME).is_file():
        console.print(f"report: {file}", highlight=False, soft_wrap=True, markup=False)


def _compared(compare: "Callable[[], Comparison]") -> "tuple[Comparison | None, str]":
    """Return a comparison, or None and why there is none."""
    try:
        return compare(), ""
    except FedrayError as error:  # what has been trained is on disk, whether or not it can be compared
        return None, str(error)


def _resumed_if_there(
    output: str | None, resume: str | None, or_resume: bool, file: str
) -> tuple[str | None, str | None]:
    """Return --output and --resume as --or-resume changes them.

    Args:
        file: the folder holds this file if there is something to continue.

    Raises:
        ConfigError: --or-resume does not fit the other two.
    """
    if not or_resume:
        return output, resume
    if output is None or resume is not None:
        raise ConfigError("--or-resume: needs --output, and excludes --resume")
    from fedray.storage.paths import StoragePath, resolve_storage

    return (None, output) if (StoragePath.of(resolve_storage(output)) / file).is_file() else (output, None)
