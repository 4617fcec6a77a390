"""The command line: fedray run, sweep, submit, jobs, validate, params, plan."""

import typer

from fedray.cli.plan import params, plan, validate
from fedray.cli.run import run, sweep
from fedray.cli.submit import jobs_app, submit

app = typer.Typer(
    name="fedray",
    help="Simulate federated fine-tuning of language models on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (run, sweep, submit, validate, params, plan):
    app.command()(command)
app.add_typer(jobs_app, name="jobs")


def main() -> None:
    """Run the command `fedray`: the entry point of the package."""
    app()
