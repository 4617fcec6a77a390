"""fedray export, fedray personalise: what comes out of a run, in folders of its own."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedray.cli.console import open_console, reported
from fedray.errors import ConfigError

if TYPE_CHECKING:
    from fedray.exports.export import Exported

Run = Annotated[str, typer.Argument(help="Folder of a finished run, a path or a URI.", metavar="RUN")]
Method = Annotated[
    str | None, typer.Option(help="A method of the run, by its name or label; may be left out if there is one only.")
]
Merge = Annotated[bool, typer.Option("--merge", help="Write whole weights for transformers, not an adapter.")]


def export(
    run: Run,
    to: Annotated[Path, typer.Option(help="Folder to write; must be empty or not exist.")],
    method: Method = None,
    client: Annotated[
        str | None, typer.Option(help="The client whose model is exported, after its last local training.")
    ] = None,
    server: Annotated[bool, typer.Option("--server", help="Export the server's own model.")] = False,
    merge: Merge = False,
) -> None:
    """Write a model of a finished run to a folder that peft, pyreft or transformers opens, with a model card."""
    console = open_console()
    with reported():
        if server == (client is not None):
            raise ConfigError("--client, --server: name a client, or ask for the server's model with --server")
        from fedray.exports.export import export as export_model

        _show(console, export_model(run, method, client, to=to, merge=merge))


def personalise(
    run: Run,
    data: Annotated[Path, typer.Option(help="File of the client's examples, with the columns of the run's data.")],
    method: Method = None,
    test: Annotated[
        Path | None, typer.Option(help="File of its test examples; default the run's share of --data.")
    ] = None,
    client: Annotated[str | None, typer.Option(help="The client's name; default that of --data.")] = None,
    tier: Annotated[str | None, typer.Option(help="A tier of the run; default the first.")] = None,
    to: Annotated[Path | None, typer.Option(help="Folder to export the model to; must be empty or not exist.")] = None,
    merge: Merge = False,
) -> None:
    """Train a client that arrives after the run, from what the server holds; evaluate and, with --to, export it."""
    console = open_console()
    with reported():
        if merge and to is None:
            raise ConfigError("--merge: needs --to, the folder to write")
        from fedray.evaluation.metrics import configured_metrics
        from fedray.exports.personalise import personalise as train
        from fedray.results.run_result import RunResult
        from fedray.results.score_tables import client_scores

        found = train(run, method, data=data, test=test, client=client, tier=tier, to=to, merge=merge)
        metrics = configured_metrics(RunResult.load(run).config)
        console.print(client_scores(found.client.id, found.report.evaluations, metrics))
        console.print(f"{found.report.steps} steps, mean training loss {found.report.train_loss:.4g}", highlight=False)
        if found.exported is not None:
            _show(console, found.exported)


def _show(console: Console, exported: "Exported") -> None:
    opener = {"load.py": "its own load.py"}.get(exported.opener, exported.opener)
    console.print(f"{exported.folder}: opens with {opener}; README.md shows how", highlight=False, soft_wrap=True)
    for note in exported.notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
