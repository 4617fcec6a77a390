"""fedray simulates federated fine-tuning of language models on Ray: FedReFT, FedALT, FedHFT and their baselines."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedray.api import run
    from fedray.config import Config, load_config
    from fedray.results.run_result import RunResult
    from fedray.sweeps.run import sweep
    from fedray.sweeps.trials import SweepResult
    from fedray.types import state_type

__version__ = "0.1.0"
__all__ = ["Config", "RunResult", "SweepResult", "load_config", "run", "state_type", "sweep"]

_PLACES = {
    "run": "api",
    "RunResult": "results.run_result",
    "Config": "config",
    "load_config": "config",
    "state_type": "types",
    "sweep": "sweeps.run",
    "SweepResult": "sweeps.trials",
}


def __getattr__(name: str) -> Any:
    """Import the public names on first use: `import fedray` itself stays instant."""
    if name in _PLACES:
        return getattr(import_module(f"fedray.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'fedray' has no attribute {name!r}")
