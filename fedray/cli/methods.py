"""fedray methods: what methods there are, and what each can be told."""

from typing import Annotated

import typer
from rich.markup import escape

from fedray.cli.console import open_console, reported


def methods(
    name: Annotated[
        str | None, typer.Argument(help="A method, to see its hyperparameters.", metavar="[NAME]", show_default=False)
    ] = None,
) -> None:
    """List the built-in methods, or show the hyperparameters of one."""
    console = open_console()
    with reported():
        from fedray.planning.catalogue import catalogue, method_facts
        from fedray.results.method_tables import hyperparameter_table, methods_table

        if name is None:
            console.print(methods_table(catalogue()))
            return
        facts = method_facts(name)
        console.print(escape(facts.about), highlight=False)
        console.print(methods_table([facts]))
        console.print(hyperparameter_table(facts))
