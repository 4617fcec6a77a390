"""What the commands share: their arguments, the terminal, and how errors end a command."""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

from fedray.errors import ConfigError, FedrayError

if TYPE_CHECKING:
    from fedray.config import Config, SweepConfig

ConfigPath = Annotated[Path, typer.Argument(help="YAML file of the experiment.", metavar="CONFIG", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Values to change, as section.key=value.", metavar="[section.key=value]...", show_default=False
    ),
]


BAD_INPUT = 2
"""Exit code of a command whose input cannot be used."""


def read_config(config: Path, overrides: list[str] | None) -> "Config":
    """Return the experiment of a YAML file with the overrides of the command line.

    Raises:
        ConfigError: the file or an override cannot be used.
    """
    from fedray.config import load_config, parse_overrides  # here, so that `--help` need not import it

    return load_config(config, parse_overrides(overrides or []))


def read_sweep(config: Path, overrides: list[str] | None) -> "SweepConfig":
    """Return the sweep of a YAML file with the overrides of the command line.

    Raises:
        ConfigError: the file or an override cannot be used.
    """
    from fedray.config import load_sweep, parse_overrides

    return load_sweep(config, parse_overrides(overrides or []))


def open_console() -> Console:
    """Return the terminal, or a console of a fixed width if there is none (job logs, pipes)."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


@contextmanager
def reported() -> Iterator[None]:
    """Report errors of the block as one message each, and exit: 2 for bad input, 1 for a failed run, 130 if
    interrupted."""
    try:
        yield
    except ConfigError as error:
        fail(f"error: {error}", BAD_INPUT)
    except FedrayError as error:
        fail(f"error: {error}", 1)
    except KeyboardInterrupt:
        fail("interrupted", 130)


def fail(message: str, code: int) -> NoReturn:
    """Print a message to stderr and exit with the code."""
    print(message, file=sys.stderr)
    raise typer.Exit(code)


def command_line(command: str, config: Path, overrides: list[str] | None, *options: str) -> str:
    """Return a command line that the user can copy."""
    return shlex.join(["fedray", command, str(config), *(overrides or []), *options])
