"""The command line: fedray run, plan, validate, params."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

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
ConfigPath = Annotated[Path, typer.Argument(help="YAML file of the experiment.", metavar="CONFIG", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Values to change, as section.key=value.", metavar="[section.key=value]...", show_default=False
    ),
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
) -> None:
    """Run an experiment: train every method, show progress, write the results."""
    console = _console()
    with _reported():
        loaded = load_config(config, parse_overrides(overrides or []))
        from fedray.api import RunResult, settle, start
        from fedray.evaluation.metrics import default_metric
        from fedray.memory_report import measured_table
        from fedray.report import LiveProgress, summary_table

        loaded, place = settle(loaded, output, resume)
        console.print("reading data and model configuration ...", highlight=False)
        try:
            with LiveProgress(console, loaded.evaluation.metric or default_metric(loaded.task)) as progress:
                for event in start(loaded, place, resume is not None):
                    progress(event)
        except KeyboardInterrupt:
            _fail(f"interrupted; to continue: fedray run {config} --resume {place}", 130)
        result = RunResult.load(place)
        console.print(summary_table(result.summaries))
        console.print(measured_table(result.memory().to_dict("records")))
        console.print(f"results: {place}", highlight=False, soft_wrap=True)


@app.command()
def validate(config: ConfigPath, overrides: Overrides = None) -> None:
    """Check an experiment, its data and its model without training; show its clients and what each method costs."""
    console = _console()
    with _reported():
        loaded = load_config(config, parse_overrides(overrides or []))
        from fedray.prepare import prepare
        from fedray.report import cost_table, data_table

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
        from fedray.prepare import costs_from_configuration
        from fedray.report import cost_table

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
        from fedray.memory_report import plan_table, room_table
        from fedray.planning import Cluster, parse_bytes, parse_node, plans, rooms, this_machine
        from fedray.prepare import footprints_from_configuration
        from fedray.report import cost_table

        nodes = tuple(parse_node(text) for text in node or [])
        size = parse_bytes(gpu_memory) if gpu_memory else 0
        if nodes:
            cluster = Cluster(nodes, size)
        elif os.environ.get("RAY_ADDRESS"):
            from fedray.driver import running_cluster

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
        _fail(f"error: {error}", 2)
    except FedrayError as error:
        _fail(f"error: {error}", 1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def _fail(message: str, code: int) -> None:
    print(message, file=sys.stderr)
    raise typer.Exit(code)


def main() -> None:
    """Entry point of the command `fedray`."""
    app()
