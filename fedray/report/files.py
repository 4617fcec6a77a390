"""Reports as files: on request, and at the end of a run, where a failure never fails what has been trained."""

import logging
from collections.abc import Callable
from pathlib import Path

from fedray.errors import FedrayError, one_line
from fedray.report.document import Report
from fedray.report.matplotlib_drawing import check_folder, write_figures
from fedray.report.page import check_place, write_page
from fedray.storage.paths import StoragePath, resolve_storage

log = logging.getLogger(__name__)

NAME = "report.html"
"""The report's file in the folder of a run or a sweep."""


def write_files(
    build: Callable[[], Report], output: str | Path | StoragePath, figures: str | Path | None = None
) -> StoragePath:
    """Write a report's page and, if asked, its figures; return where the page is.

    Args:
        build: returns the report; called once the places are known to be free.
        figures: a folder for every figure as SVG, PNG and CSV.

    Raises:
        ConfigError: something that is no report would be overwritten.
        StorageError: a file cannot be written.
    """
    place = output if isinstance(output, StoragePath) else StoragePath.of(resolve_storage(output))
    folder = None if figures is None else StoragePath.of(resolve_storage(figures))
    check_place(place)
    if folder is not None:
        check_folder(folder)
    report = build()
    write_page(report, place)
    if folder is not None:
        write_figures(list(report.figures()), folder)
    return place


def write_after(build: Callable[[], Report], place: StoragePath) -> bool:
    """Write a report into the folder of a finished run or sweep; log a warning with the cause if that fails.

    Args:
        build: returns the report.

    Returns:
        Whether it was written.
    """
    try:
        write_page(build(), place / NAME)
    except Exception as error:  # whatever it is, the results are on disk
        cause = str(error) if isinstance(error, FedrayError) else f"{type(error).__name__}: {one_line(error)}"
        log.warning(
            "the report could not be written, but the results are complete: %s; try again: fedray report %s",
            cause,
            place,
        )
        return False
    return True
