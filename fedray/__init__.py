"""fedray simulates federated fine-tuning of language models on Ray: FedReFT, FedALT, FedHFT and their baselines."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedray.api import RunResult, run
    from fedray.config import Config, load_config
    from fedray.sweeps import sweep
    from fedray.trials import SweepResult

__version__ = "0.1.0"
__all__ = ["Config", "RunResult", "SweepResult", "load_config", "run", "sweep"]

_PLACES = {
    "run": "api",
    "RunResult": "api",
    "Config": "config",
    "load_config": "config",
    "sweep": "sweeps",
    "SweepResult": "trials",
}


def __getattr__(name: str) -> Any:
    """Import the public names on first use: `import fedray` itself stays instant."""
    if name in _PLACES:
        return getattr(import_module(f"fedray.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'fedray' has no attribute {name!r}")
