"""fedray compare: the methods of runs and sweeps, with intervals and tests."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from fedray.cli.console import open_console, reported
from fedray.errors import ConfigError

Format = Literal["table", "markdown", "latex", "csv"]
SUFFIXES: dict[str, Format] = {".txt": "table", ".md": "markdown", ".tex": "latex", ".csv": "csv"}
"""The format of a file that --format does not name."""


def compare(
    results: Annotated[list[str], typer.Argument(help="Folders of runs and sweeps.", metavar="RUN|SWEEP...")],
    reference: Annotated[
        list[str] | None,
        typer.Option(help="Method that the others are compared with; may be repeated. Default: local, fedavg."),
    ] = None,
    metric: Annotated[str | None, typer.Option(help="A metric that all runs have. Default: their first one.")] = None,
    moment: Annotated[
        Literal["personalised", "aggregated"],
        typer.Option(help="When clients are measured: after their last local training, or before it."),
    ] = "personalised",
    method: Annotated[list[str] | None, typer.Option(help="Compare only this method; may be repeated.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Compare only this seed; may be repeated.")] = None,
    format: Annotated[Format | None, typer.Option(help="Default: table, or what the suffix of --to says.")] = None,
    to: Annotated[Path | None, typer.Option(help="File to write: .txt, .md, .tex, .csv.")] = None,
) -> None:
    """Compare methods, paired by seed and client: differences with intervals, tests over seeds, ranks over data sets.

    Runs on one data set are merged by seed. Of a sweep, each method is compared at its best point.
    """
    console = open_console()
    with reported():
        if format is None and to is not None and to.suffix not in SUFFIXES:
            raise ConfigError(f"--to {to}: no format has the suffix {to.suffix!r}; name one with --format")
        chosen = format or (SUFFIXES[to.suffix] if to else "table")
        from fedray.results.comparison_tables import FORMATS, rich_tables
        from fedray.sweeps.compare import compare as compare_results

        found = compare_results(
            *results,
            reference=reference or (),
            metric=metric,
            moment=moment,
            methods=method or (),
            seeds=seed or (),
        )
        if to is not None:
            try:
                to.write_text(FORMATS[chosen](found), encoding="utf-8")
            except OSError as error:
                raise ConfigError(f"--to {to}: cannot be written: {error}") from None
            console.print(f"written: {to}", highlight=False, soft_wrap=True)
        elif chosen == "table":
            console.print(rich_tables(found))
        else:
            print(FORMATS[chosen](found), end="")
