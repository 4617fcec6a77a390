"""fedray lm-eval: a run's models in lm-evaluation-harness."""

from typing import Annotated, Any, Literal

import typer

from fedray.cli.console import open_console, reported
from fedray.errors import ConfigError


def lm_eval(
    run: Annotated[str, typer.Argument(help="Folder of a finished run.", metavar="RUN", show_default=False)],
    tasks: Annotated[str, typer.Option(help="Tasks, groups or tags of the harness, separated by commas.")],
    method: Annotated[
        list[str] | None, typer.Option(help="A method of the run; may be repeated. Default: its only one.")
    ] = None,
    client: Annotated[list[str] | None, typer.Option(help="Evaluate this client's model; may be repeated.")] = None,
    server: Annotated[
        bool, typer.Option("--server", help="Evaluate the server's own model. Without --client it is anyway.")
    ] = False,
    moment: Annotated[
        Literal["personalised", "aggregated"],
        typer.Option(help="The clients' models after their last local training, or before it."),
    ] = "personalised",
    include_path: Annotated[
        list[str] | None, typer.Option(help="Folder with task files of your own; may be repeated.")
    ] = None,
    metadata: Annotated[
        list[str] | None, typer.Option(help="Value for the tasks, as key=value; may be repeated.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples in the prompt. Default: what each task says.")
    ] = None,
    limit: Annotated[
        float | None, typer.Option(help="Only this many examples per task, or this share below 1: for smoke tests.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Texts in a pass. Default: the run's evaluation.batch_size.")
    ] = None,
    device: Annotated[Literal["cuda", "cpu"] | None, typer.Option(help="Default: a GPU, if there is one.")] = None,
    output: Annotated[str | None, typer.Option(help="File of the results: .json or .csv.")] = None,
) -> None:
    """Evaluate models of a finished run, and their frozen base model, on tasks of lm-evaluation-harness.

    Needs the extra lm-eval. jobs/papers/lm_eval has tasks in the protocols of LLM-Adapters and pyreft.
    """
    console = open_console()
    with reported():
        from fedray.experiment.harness import lm_eval as evaluate
        from fedray.results.harness import check_output

        if output is not None:
            check_output(output)
        result = evaluate(
            run,
            [name for name in tasks.split(",") if name],
            method=method,
            client=client or (),
            server=server,
            moment=moment,
            include_path=include_path or (),
            metadata=_values(metadata or []),
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=batch_size,
            device=device,
        )
        console.print(result.table())
        if output is not None:
            result.write(output)
            console.print(f"written: {output}", highlight=False, soft_wrap=True)


def _values(arguments: list[str]) -> dict[str, Any]:
    """Return values for tasks; each is YAML.

    Raises:
        ConfigError: one is not key=value.
    """
    from fedray.config import parse_yaml

    found = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or not name:
            raise ConfigError(f"--metadata {argument!r}: expected key=value, for example llm_adapters=FOLDER")
        found[name] = parse_yaml(value, f"--metadata {name}")
    return found
