"""What the commands share: their arguments, the terminal, and how errors end a command."""

import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Program:
    """The command `fedray` as a program of its own; not where Python calls it.

    Attributes:
        arguments: of the command line.
        path: where Python looks for modules first. Importing Ray changes that.
    """

    arguments: tuple[str, ...]
    path: str


@contextmanager
def begun_apart(context: typer.Context, file: Path) -> Iterator[Callable[[], None]]:
    """Begin to import, in a process of its own, the libraries that the command needs (`runtime.apart`).

    Args:
        file: of the configuration. That process reads it again, which a pipe does not allow.

    Yields:
        A function that runs the command line in that process and exits with its code; it returns if this is that
        process, or if there can be none.
    """
    program = context.find_object(Program)
    if program is None or not file.is_file():
        yield lambda: None
        return
    from fedray.runtime import apart

    def run_apart() -> None:
        if (code := apart.run_apart(program.arguments, program.path)) is not None:
            raise typer.Exit(code)

    with apart.begun():
        yield run_apart


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
    interrupted, 143 if terminated."""
    try:
        yield
    except ConfigError as error:
        fail(f"error: {error}", BAD_INPUT)
    except FedrayError as error:
        fail(f"error: {error}", 1)
    except KeyboardInterrupt as error:
        fail(*how_interrupted(error))


class Terminated(KeyboardInterrupt):
    """The process got SIGTERM."""


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM, which schedulers and `docker stop` send, end the block as Ctrl-C does, with `Terminated`."""

    def end(*_: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread gets signals
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None: it was not Python's


def how_interrupted(error: KeyboardInterrupt) -> tuple[str, int]:
    """Return what has happened, and the exit code that shells give it."""
    return ("terminated", 143) if isinstance(error, Terminated) else ("interrupted", 130)


def fail(message: str, code: int) -> NoReturn:
    """Print a message to stderr and exit with the code."""
    print(message, file=sys.stderr)
    raise typer.Exit(code)


def command_line(command: str, config: Path, overrides: list[str] | None, *options: str) -> str:
    """Return a command line that the user can copy."""
    return shlex.join(["fedray", command, str(config), *(overrides or []), *options])
