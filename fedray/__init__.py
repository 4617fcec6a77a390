"""fedray simulates federated fine-tuning of language models on Ray: FedReFT, FedALT, FedHFT and their baselines."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedray.api import RunResult, run
    from fedray.config import Config, load_config

__version__ = "0.1.0"
__all__ = ["Config", "RunResult", "load_config", "run"]


def __getattr__(name: str) -> Any:
    """Import the public names on first use: `import fedray` itself stays instant."""
    if name in ("run", "RunResult"):
        from fedray import api

        return getattr(api, name)
    if name in ("Config", "load_config"):
        from fedray import config

        return getattr(config, name)
    raise AttributeError(f"module 'fedray' has no attribute {name!r}")
