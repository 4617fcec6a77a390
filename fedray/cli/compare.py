"""fedray compare: the methods of runs and sweeps, with intervals and tests."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from fedray.cli.console import open_console, reported
from fedray.errors import ConfigError, choices

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
        Literal["personalised", "aggregated"] | None,
        typer.Option(
            help="When clients are measured: after their last local training, or before it. "
            "Default: personalised where all runs have it."
        ),
    ] = None,
    method: Annotated[list[str] | None, typer.Option(help="Compare only this method; may be repeated.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Compare only this seed; may be repeated.")] = None,
    published: Annotated[
        Path | None,
        typer.Option(
            help="Show what papers print beside what these runs have instead: a file as jobs/papers/published.yaml."
        ),
    ] = None,
    format: Annotated[Format | None, typer.Option(help="Default: table, or what the suffix of --to says.")] = None,
    to: Annotated[Path | None, typer.Option(help="File to write: .txt, .md, .tex, .csv.")] = None,
) -> None:
    """Compare methods, paired by seed and client: differences with intervals, tests over seeds, ranks over data sets.

    Runs on one data set are merged by seed. Of a sweep, each method is compared at its best point. With --published,
    what papers print beside what the runs have.
    """
    console = open_console()
    with reported():
        if format is None and to is not None and to.suffix not in SUFFIXES:
            raise ConfigError(f"--to {to}: no format has the suffix {to.suffix!r}; name one with --format")
        chosen = format or (SUFFIXES[to.suffix] if to else "table")
        given = {"--reference": reference, "--metric": metric, "--moment": moment}
        if published is not None and (wrong := [name for name, value in given.items() if value]):
            raise ConfigError(f"{choices(wrong)}: not with --published, whose file says what is shown")
        from fedray.results.sheets import FORMATS, rich_tables
        from fedray.sweeps.compare import compare as compare_results
        from fedray.sweeps.compare import opened_runs

        csv: Callable[[], str]
        if published is not None:
            from fedray.results import published as numbers

            runs, _ = opened_runs(results)
            tables = numbers.beside_published(runs, numbers.load_published(published), method or (), seed or ())
            csv = partial(numbers.csv, tables)
        else:
            from fedray.results import comparison_tables

            found = compare_results(
                *results,
                reference=reference or (),
                metric=metric,
                moment=moment,
                methods=method or (),
                seeds=seed or (),
            )
            tables = comparison_tables.sheets(found)
            csv = partial(comparison_tables.csv, found)
        if to is None and chosen == "table":
            console.print(rich_tables(tables))
            return
        text = csv() if chosen == "csv" else FORMATS[chosen](tables)
        if to is None:
            print(text, end="")
            return
        try:
            to.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--to {to}: cannot be written: {error}") from None
        console.print(f"written: {to}", highlight=False, soft_wrap=True)
