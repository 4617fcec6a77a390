"""fedray report: one page with the tables and figures of runs and sweeps."""

from typing import Annotated

import typer

from fedray.cli.console import open_console, reported


def report(
    results: Annotated[list[str], typer.Argument(help="Folders of runs and sweeps.", metavar="RUN|SWEEP...")],
    output: Annotated[
        str | None, typer.Option(help="The page to write. Default: report.html in the folder of the only result.")
    ] = None,
    figures: Annotated[
        str | None, typer.Option(help="Folder for every figure as SVG and PNG, with its data as CSV.", metavar="DIR")
    ] = None,
) -> None:
    """Write a report: one HTML page with tables and figures, which opens without a network.

    Runs on one data set are merged by seed, as by `fedray compare`. Of a sweep, each method is shown at its best point.
    """
    console = open_console()
    with reported():
        from fedray.sweeps.page import write_report

        place = write_report(*results, output=output, figures=figures)
        console.print(f"report: {place}", highlight=False, soft_wrap=True, markup=False)
        if figures is not None:
            console.print(f"figures: {figures}", highlight=False, soft_wrap=True, markup=False)
