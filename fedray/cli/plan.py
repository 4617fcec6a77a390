"""fedray validate, fedray params, fedray plan: what an experiment is and costs before it runs."""

import os
from dataclasses import replace
from typing import Annotated

import typer

from fedray.cli.console import ConfigPath, Overrides, open_console, read_config, reported
from fedray.errors import ConfigError, choices


def validate(
    config: ConfigPath,
    overrides: Overrides = None,
    show: Annotated[
        int,
        typer.Option(help="Print this many training examples as tokens, with what is read and what is learned.", min=0),
    ] = 0,
    report: Annotated[
        bool, typer.Option("--report", help="Write a page that draws which client holds what, and the costs.")
    ] = False,
    output: Annotated[
        str | None, typer.Option(help="The page that --report writes. Default: NAME-data.html in this folder.")
    ] = None,
    figures: Annotated[
        str | None, typer.Option(help="With --report: folder for every figure as SVG, PNG and CSV.", metavar="DIR")
    ] = None,
) -> None:
    """Check an experiment, its data and its model without training; show its clients and what each method costs."""
    console = open_console()
    with reported():
        loaded = read_config(config, overrides)
        given = {"--output": output, "--figures": figures}
        if not report and (alone := [name for name, value in given.items() if value is not None]):
            raise ConfigError(f"{choices(alone)}: only with --report")
        from fedray.experiment.callbacks import check_trackers
        from fedray.experiment.prepare import prepare
        from fedray.results.report import cost_table, data_table, parts_table
        from fedray.storage.paths import StoragePath, resolve_storage

        check_trackers(loaded, StoragePath.of(resolve_storage(loaded.storage_path)))
        prepared = prepare(loaded)
        if loaded.runtime == "ray":
            from fedray.runtime.driver import check_cluster

            check_cluster(loaded)
        console.print(data_table(prepared.clients, prepared.data))
        if prepared.data.parts:
            console.print(parts_table(prepared.data))
        console.print(cost_table(prepared.costs))
        if show:
            from fedray.models.tokenizer import load_tokenizer
            from fedray.results.token_view import show_examples

            show_examples(console, prepared.data, load_tokenizer(loaded.model), show)
        if report:
            from fedray.experiment.data_report import data_report
            from fedray.report.files import write_files

            place = write_files(lambda: data_report(prepared), output or f"{loaded.name}-data.html", figures)
            console.print(f"report: {place}", highlight=False, soft_wrap=True, markup=False)
        console.print("the experiment is valid", highlight=False)


def params(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print what each method trains and sends, from the model's configuration alone (no weights)."""
    console = open_console()
    with reported():
        loaded = read_config(config, overrides)
        from fedray.experiment.outline import costs_from_configuration
        from fedray.results.report import cost_table

        console.print(cost_table(costs_from_configuration(loaded)))


def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    gpu_memory: Annotated[str | None, typer.Option(help="Memory of one GPU, for example 24GB.")] = None,
    node: Annotated[
        list[str] | None,
        typer.Option(help='A node of a planned cluster, for example "CPU=16,GPU=4,memory=64GB"; may be repeated.'),
    ] = None,
    data: Annotated[
        bool,
        typer.Option(
            help="Read the data, whose longest texts and answers decide the memory; or assume that every example has "
            "data.max_length tokens, with a loss at each."
        ),
    ] = True,
) -> None:
    """Predict the memory of every method on every tier, and how many client actors fit, without training.

    The cluster is described by --node, or else it is the one that RAY_ADDRESS names, or else this machine.
    """
    console = open_console()
    with reported():
        loaded = read_config(config, overrides)
        from fedray.experiment.outline import footprints
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
        found = footprints(loaded, read_data=data)
        made = plans(loaded, found, cluster)
        console.print(
            cost_table({method: {tier: cost for tier, (cost, _) in by.items()} for method, by in found.items()})
        )
        console.print(plan_table(made))
        console.print(room_table(rooms(loaded.clients, made, cluster.nodes)))
