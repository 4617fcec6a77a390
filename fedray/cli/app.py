"""The command line: fedray run, sweep, submit, jobs, plan, validate, params."""

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from fedray.config import load_config, parse_overrides
from fedray.errors import ConfigError, FedrayError

app = typer.Typer(
    name="fedray",
    help="Simulate federated fine-tuning of language models on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
jobs_app = typer.Typer(help="Look at and stop what was submitted to a cluster.", no_args_is_help=True)
app.add_typer(jobs_app, name="jobs")
ConfigPath = Annotated[Path, typer.Argument(help="YAML file of the experiment.", metavar="CONFIG", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Values to change, as section.key=value.", metavar="[section.key=value]...", show_default=False
    ),
]


BAD_INPUT = 2
"""Exit code."""

OrResume = Annotated[bool, typer.Option("--or-resume", help="Continue what is in --output, if there is something.")]
Address = Annotated[
    str | None,
    typer.Option(help="The cluster's dashboard, as in http://HEAD:8265; default RAY_ADDRESS, or this machine's."),
]


@app.command()
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    output: Annotated[
        str | None, typer.Option(help="Folder of the results, a path or a URI; must be empty or not exist.")
    ] = None,
    resume: Annotated[
        str | None, typer.Option(help="Folder of a run that ended early, or shall have more rounds.")
    ] = None,
    or_resume: OrResume = False,
) -> None:
    """Run an experiment: train every method, show progress, write the results."""
    console = _console()
    with _reported():
        loaded = load_config(config, parse_overrides(overrides or []))
        from fedray.api import start
        from fedray.evaluation.metrics import configured_metric
        from fedray.experiment.resume import resolve_run
        from fedray.results.memory_report import measured_table
        from fedray.results.report import LiveProgress, summary_table
        from fedray.results.run_result import RunResult

        output, resume = _resumed_if_there(output, resume, or_resume, "config.yaml")
        loaded, place = resolve_run(loaded, output, resume)
        console.print("reading data and model configuration ...", highlight=False)
        metric = configured_metric(loaded.evaluation, loaded.task)
        try:
            with LiveProgress(console, metric) as progress:
                for event in start(loaded, place, resume is not None):
                    progress(event)
        except KeyboardInterrupt:
            _fail(f"interrupted; to continue: {_again('run', config, overrides, '--resume', str(place))}", 130)
        result = RunResult.load(place)
        console.print(summary_table(result.summaries, metric))
        console.print(measured_table(result.memory().to_dict("records")))
        console.print(f"results: {place}", highlight=False, soft_wrap=True)


@app.command()
def sweep(
    config: Annotated[Path, typer.Argument(help="YAML file of the sweep.", metavar="SWEEP", show_default=False)],
    overrides: Overrides = None,
    output: Annotated[str | None, typer.Option(help="Folder of the sweep; must be empty or not exist.")] = None,
    resume: Annotated[str | None, typer.Option(help="Folder of a sweep that ended early.")] = None,
    or_resume: OrResume = False,
) -> None:
    """Run many experiments, the points of a space, on one cluster, and compare them."""
    console = _console()
    with _reported():
        from fedray.config import load_sweep

        asked = load_sweep(config, parse_overrides(overrides or []))
        from fedray.sweeps.report import SweepProgress, sweep_table
        from fedray.sweeps.run import resolve_sweep, run_trials

        output, resume = _resumed_if_there(output, resume, or_resume, "sweep.yaml")
        found = resolve_sweep(asked, output, resume)
        console.print(f"{len(found.trials)} trials", highlight=False)
        try:
            with SweepProgress(console, found) as progress:
                found = run_trials(found, progress)
        except KeyboardInterrupt:
            _fail(f"interrupted; to continue: {_again('sweep', config, overrides, '--resume', str(found.place))}", 130)
        console.print(sweep_table(found))
        console.print(f"results: {found.place}", highlight=False, soft_wrap=True)
        if found.best is None:
            _fail("no trial finished; trials.parquet has their errors", 1)


@app.command()
def submit(
    config: Annotated[Path, typer.Argument(help="YAML file of an experiment or a sweep.", metavar="CONFIG")],
    overrides: Overrides = None,
    address: Address = None,
    output: Annotated[
        str | None,
        typer.Option(
            help="Folder of the results; what is in it is continued. Relative: below the cluster's FEDRAY_STORAGE."
        ),
    ] = None,
    working_dir: Annotated[
        Path, typer.Option(help="Folder that the job gets, but for what .gitignore and .rayignore name.")
    ] = Path("."),
    env: Annotated[list[str] | None, typer.Option(help="NAME=VALUE in the job's environment; once for each.")] = None,
    wait: Annotated[bool, typer.Option(help="Show the log until the job ends.")] = True,
) -> None:
    """Run an experiment or a sweep as a job on a Ray cluster; the exit code is the job's."""
    console = _console()
    with _reported():
        from fedray.cli.jobs_api import connect, follow, is_sweep
        from fedray.cli.jobs_api import submit as submit_job
        from fedray.config import load_sweep
        from fedray.storage.paths import timestamped
        from fedray.sweeps.trials import trials_of

        values = parse_overrides(overrides or [])
        if is_sweep(config):
            asked = load_sweep(config, values)
            trials_of(asked)
            name, storage = asked.name, load_config(asked.base).storage_path
        else:
            loaded = load_config(config, values)
            name, storage = loaded.name, loaded.storage_path
        client = connect(address)
        place = output or f"{storage}/{timestamped(name)}"
        job = submit_job(
            client,
            config,
            overrides or (),
            working_dir=working_dir,
            place=place,
            environment=_assignments(env or []),
        )
        console.print(f"job {job}; results: {place}", highlight=False, soft_wrap=True)
        more = ["--output", place, *(["--address", address] if address else [])]
        more += [] if working_dir == Path(".") else ["--working-dir", str(working_dir)]
        again = _again("submit", config, overrides, *more, *(word for pair in env or [] for word in ("--env", pair)))
        if not wait:
            console.print(f"to watch it: fedray jobs logs {job} --follow", highlight=False, soft_wrap=True)
            return
        try:
            code = follow(client, job, _show)
        except KeyboardInterrupt:
            _fail(
                f"the job goes on; to stop it: fedray jobs stop {job}; to watch it: fedray jobs logs {job} -f",
                130,
            )
        if code:
            _fail(f"the job ended with {code}" + (f"; to continue it: {again}" if code != BAD_INPUT else ""), code)


@jobs_app.command("list")
def jobs_list(address: Address = None) -> None:
    """Show the jobs of a cluster."""
    console = _console()
    with _reported():
        from fedray.cli.jobs_api import connect, jobs
        from fedray.results.report import jobs_table

        console.print(jobs_table(jobs(connect(address))))


@jobs_app.command("logs")
def jobs_logs(
    id: Annotated[str, typer.Argument(help="The job.", metavar="JOB")],
    address: Address = None,
    following: Annotated[bool, typer.Option("--follow", "-f", help="Until the job ends.")] = False,
) -> None:
    """Show a job's log; with --follow, the exit code is the job's."""
    with _reported():
        from fedray.cli.jobs_api import connect, follow, log

        client = connect(address)
        text = log(client, id)  # says so if there is no such job
        if not following:
            _show(text)
        elif code := follow(client, id, _show):
            raise typer.Exit(code)


@jobs_app.command("stop")
def jobs_stop(id: Annotated[str, typer.Argument(help="The job.", metavar="JOB")], address: Address = None) -> None:
    """Stop a job; its last checkpoint stays."""
    console = _console()
    with _reported():
        from fedray.cli.jobs_api import connect, stop

        console.print(f"{id}: {stop(connect(address), id).value.lower()}", highlight=False)


@app.command()
def validate(config: ConfigPath, overrides: Overrides = None) -> None:
    """Check an experiment, its data and its model without training; show its clients and what each method costs."""
    console = _console()
    with _reported():
        loaded = load_config(config, parse_overrides(overrides or []))
        from fedray.experiment.prepare import prepare
        from fedray.results.report import cost_table, data_table

        prepared = prepare(loaded)
        console.print(data_table(prepared.clients, prepared.data))
        console.print(cost_table(prepared.costs))
        console.print("the experiment is valid", highlight=False)


@app.command()
def params(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print what each method trains and sends, from the model's configuration alone (no weights)."""
    console = _console()
    with _reported():
        loaded = load_config(config, parse_overrides(overrides or []))
        from fedray.experiment.prepare import costs_from_configuration
        from fedray.results.report import cost_table

        console.print(cost_table(costs_from_configuration(loaded)))


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    gpu_memory: Annotated[str | None, typer.Option(help="Memory of one GPU, for example 24GB.")] = None,
    node: Annotated[
        list[str] | None,
        typer.Option(help='A node of a planned cluster, for example "CPU=16,GPU=4,memory=64GB"; once for each.'),
    ] = None,
) -> None:
    """Predict the memory of every method on every tier, and how many client actors fit; nothing is trained.

    The cluster: --node, else the one that RAY_ADDRESS names, else this machine.
    """
    console = _console()
    with _reported():
        loaded = load_config(config, parse_overrides(overrides or []))
        from fedray.experiment.prepare import footprints_from_configuration
        from fedray.planning.cluster_plan import Cluster, parse_bytes, parse_node, plans, rooms, this_machine
        from fedray.results.memory_report import plan_table, room_table
        from fedray.results.report import cost_table

        nodes = tuple(parse_node(text) for text in node or [])
        size = parse_bytes(gpu_memory) if gpu_memory else 0
        if nodes:
            cluster = Cluster(nodes, size)
        elif os.environ.get("RAY_ADDRESS"):
            from fedray.runtime.driver import running_cluster

            cluster = running_cluster()
        else:
            cluster = this_machine()
        cluster = replace(cluster, gpu_memory=size or cluster.gpu_memory)
        found = footprints_from_configuration(loaded)
        made = plans(loaded, found, cluster)
        console.print(
            cost_table({method: {tier: cost for tier, (cost, _) in by.items()} for method, by in found.items()})
        )
        console.print(plan_table(made))
        console.print(room_table(rooms(loaded.clients, made, cluster.nodes)))


def _console() -> Console:
    """Return the terminal, or a wide sheet where there is none (job logs, pipes)."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


@contextmanager
def _reported() -> Iterator[None]:
    """Print what went wrong as one message. Exit codes: 2 bad input, 1 a run that failed, 130 interrupted."""
    try:
        yield
    except ConfigError as error:
        _fail(f"error: {error}", BAD_INPUT)
    except FedrayError as error:
        _fail(f"error: {error}", 1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def _resumed_if_there(
    output: str | None, resume: str | None, or_resume: bool, file: str
) -> tuple[str | None, str | None]:
    """Return --output and --resume after --or-resume. file: is in the folder where there is something to continue."""
    if not or_resume:
        return output, resume
    if output is None or resume is not None:
        raise ConfigError("--or-resume: goes with --output, and without --resume")
    from fedray.storage.paths import StoragePath, resolve_storage

    return (None, output) if (StoragePath.of(resolve_storage(output)) / file).is_file() else (output, None)


def _again(command: str, config: Path, overrides: list[str] | None, *options: str) -> str:
    """Return the command line that continues."""
    return shlex.join(["fedray", command, str(config), *(overrides or []), *options])


def _assignments(arguments: list[str]) -> dict[str, str]:
    pairs = [argument.partition("=") for argument in arguments]
    if wrong := [name for name, equals, _ in pairs if not (name and equals)]:
        raise ConfigError(f"--env {wrong[0]}: expected NAME=VALUE")
    return {name: value for name, _, value in pairs}


def _show(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _fail(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    raise typer.Exit(code)


def main() -> None:
    """Entry point of the command `fedray`."""
    app()
