"""The command line: fedray quickstart, run, sweep, compare, report, lm-eval, export, personalise, submit, jobs,
validate, params, plan, methods."""

import gc
import sys
from typing import Annotated

import typer

from fedray import __version__
from fedray.cli.compare import compare
from fedray.cli.console import Program
from fedray.cli.export import export, personalise
from fedray.cli.harness import lm_eval
from fedray.cli.methods import methods
from fedray.cli.plan import params, plan, validate
from fedray.cli.quickstart import quickstart
from fedray.cli.report import report
from fedray.cli.run import run, sweep
from fedray.cli.submit import jobs_app, submit

COLLECT_AFTER = 50_000, 20, 100
"""Thresholds of Python's garbage collector. Importing the libraries creates about a million objects that live as long
as the process. With Python's default thresholds, scanning them repeatedly takes a sixth of `fedray validate`'s time."""

app = typer.Typer(
    name="fedray",
    help="Simulate federated fine-tuning of language models on Ray.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"fedray {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Simulate federated fine-tuning of language models on Ray."""


for command in (
    quickstart,
    run,
    sweep,
    compare,
    report,
    lm_eval,
    export,
    personalise,
    submit,
    validate,
    params,
    plan,
    methods,
):
    app.command()(command)
app.add_typer(jobs_app, name="jobs")


def main() -> None:
    """Run the command `fedray`: the entry point of the package."""
    gc.set_threshold(*COLLECT_AFTER)
    app(obj=Program(tuple(sys.argv[1:]), sys.path[0]))
