"""A real local Ray cluster of this test session's own: its own ports and temporary folder, ended by handle."""

import logging
import os
from collections.abc import Iterator

import pytest
import ray


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Two CPUs. Unix socket paths are short, so the folder cannot lie under pytest's own."""
    folder = f"/tmp/fedray-test-{os.getpid()}"
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        _temp_dir=folder,
        object_store_memory=200_000_000,
    )
    yield
    ray.shutdown()
