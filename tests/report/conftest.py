"""A real run that writes a report."""

from pathlib import Path

import pytest
from reported import REPORTED

import fedray
from fedray.results.run_result import RunResult


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A run of the three papers' methods and `local`, with stragglers and scores of every round."""
    return fedray.run(REPORTED, output=tmp_path_factory.mktemp("report") / "run")


@pytest.fixture
def place(finished: RunResult) -> Path:
    """The folder of `finished`."""
    return finished.path
