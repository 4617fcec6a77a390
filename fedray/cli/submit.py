"""fedray submit, fedray jobs: experiments as jobs on a cluster."""

import sys
from pathlib import Path
from secrets import token_hex
from typing import Annotated

import typer

from fedray.cli.console import BAD_INPUT, Overrides, command_line, fail, open_console, read_config, read_sweep, reported
from fedray.errors import ConfigError

jobs_app = typer.Typer(help="List, show and stop the jobs of a cluster.", no_args_is_help=True)

Address = Annotated[
    str | None,
    typer.Option(help="The cluster's dashboard, as in http://HEAD:8265; default RAY_ADDRESS, or this machine's."),
]


def submit(
    config: Annotated[Path, typer.Argument(help="YAML file of an experiment or a sweep.", metavar="CONFIG")],
    overrides: Overrides = None,
    address: Address = None,
    output: Annotated[
        str | None,
        typer.Option(
            help="Folder of the results; a run in it is continued. Relative: below the cluster's FEDRAY_STORAGE."
        ),
    ] = None,
    working_dir: Annotated[
        Path, typer.Option(help="Folder that the job gets, without what .gitignore and .rayignore exclude.")
    ] = Path("."),
    env: Annotated[list[str] | None, typer.Option(help="NAME=VALUE in the job's environment; may be repeated.")] = None,
    wait: Annotated[bool, typer.Option(help="Show the log until the job ends.")] = True,
) -> None:
    """Run an experiment or a sweep as a job on a Ray cluster; the exit code is the job's."""
    console = open_console()
    with reported():
        from fedray.cli.jobs_api import connect, follow, is_sweep
        from fedray.cli.jobs_api import submit as submit_job
        from fedray.config import load_config
        from fedray.storage.paths import timestamped
        from fedray.sweeps.space import trials_of

        if is_sweep(config):
            sweep = read_sweep(config, overrides)
            trials_of(sweep)
            name, storage = sweep.name, load_config(sweep.base).storage_path
        else:
            loaded = read_config(config, overrides)
            name, storage = loaded.name, loaded.storage_path
        client = connect(address)
        place = output or f"{storage}/{timestamped(name)}-{token_hex(3)}"  # another one may be submitted this second
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
        more += [word for pair in env or [] for word in ("--env", pair)]
        again = command_line("submit", config, overrides, *more)
        if not wait:
            console.print(f"to watch it: fedray jobs logs {job} --follow", highlight=False, soft_wrap=True)
            return
        try:
            code = follow(client, job, _show)
        except KeyboardInterrupt:
            fail(
                f"the job continues; to stop it: fedray jobs stop {job}; to watch it: fedray jobs logs {job} -f",
                130,
            )
        if code:
            fail(f"the job ended with {code}" + (f"; to continue it: {again}" if code != BAD_INPUT else ""), code)


@jobs_app.command("list")
def jobs_list(address: Address = None) -> None:
    """Show the jobs of a cluster."""
    console = open_console()
    with reported():
        from fedray.cli.jobs_api import connect, jobs
        from fedray.results.report import jobs_table

        console.print(jobs_table(jobs(connect(address))))


@jobs_app.command("logs")
def jobs_logs(
    id: Annotated[str, typer.Argument(help="The job's id.", metavar="JOB")],
    address: Address = None,
    following: Annotated[bool, typer.Option("--follow", "-f", help="Show the log until the job ends.")] = False,
) -> None:
    """Show a job's log; with --follow, the exit code is the job's."""
    with reported():
        from fedray.cli.jobs_api import connect, follow, log

        client = connect(address)
        text = log(client, id)  # raises if there is no such job
        if not following:
            _show(text)
        elif code := follow(client, id, _show):
            raise typer.Exit(code)


@jobs_app.command("stop")
def jobs_stop(id: Annotated[str, typer.Argument(help="The job's id.", metavar="JOB")], address: Address = None) -> None:
    """Stop a job; its last checkpoint is kept."""
    console = open_console()
    with reported():
        from fedray.cli.jobs_api import connect, stop

        console.print(f"{id}: {stop(connect(address), id).value.lower()}", highlight=False)


def _assignments(arguments: list[str]) -> dict[str, str]:
    pairs = [argument.partition("=") for argument in arguments]
    if wrong := [name for name, equals, _ in pairs if not (name and equals)]:
        raise ConfigError(f"--env {wrong[0]}: expected NAME=VALUE")
    return {name: value for name, _, value in pairs}


def _show(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
