"""fedray simulates federated fine-tuning of language models on Ray: FedReFT, FedALT, FedHFT and their baselines.

Uses: api, config, experiment, exports, federation, results, sweeps.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedray.api import load, run
    from fedray.config import Config, load_config
    from fedray.experiment.harness import lm_eval
    from fedray.exports.export import export
    from fedray.exports.personalise import personalise
    from fedray.federation.events import Callback
    from fedray.results.comparison import Comparison
    from fedray.results.run_result import RunResult
    from fedray.sweeps.compare import compare
    from fedray.sweeps.page import write_report
    from fedray.sweeps.result import SweepResult
    from fedray.sweeps.run import sweep
    from fedray.types import state_type

__version__ = "0.1.0"
__all__ = [
    "Callback",
    "Comparison",
    "Config",
    "RunResult",
    "SweepResult",
    "compare",
    "export",
    "lm_eval",
    "load",
    "load_config",
    "personalise",
    "run",
    "state_type",
    "sweep",
    "write_report",
]

_PLACES = {
    "run": "api",
    "load": "api",
    "personalise": "exports.personalise",
    "export": "exports.export",
    "compare": "sweeps.compare",
    "Comparison": "results.comparison",
    "lm_eval": "experiment.harness",
    "RunResult": "results.run_result",
    "Callback": "federation.events",
    "Config": "config",
    "load_config": "config",
    "state_type": "types",
    "sweep": "sweeps.run",
    "SweepResult": "sweeps.result",
    "write_report": "sweeps.page",
}


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that `import fedray` itself stays fast."""
    if name in _PLACES:
        return getattr(import_module(f"fedray.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'fedray' has no attribute {name!r}")
