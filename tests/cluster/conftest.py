"""A real local Ray cluster of this test session's own: its own ports and temporary folder, ended by handle."""

import os
from collections.abc import Iterator

import pytest
import ray

from fedray.driver import start_ray


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Two CPUs, and two GPUs that exist in Ray's books only. Unix socket paths are short, so the folder cannot
    lie under pytest's own."""
    folder = f"/tmp/fedray-test-{os.getpid()}"
    start_ray(
        address="local",
        num_cpus=2,
        num_gpus=2,
        include_dashboard=False,
        _temp_dir=folder,
        object_store_memory=200_000_000,
    )
    yield
    ray.shutdown()
