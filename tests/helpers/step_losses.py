"""Plain torch as an engine, which also writes the mean loss of every optimizer step into a file."""

from pathlib import Path
from typing import Any

from fedray.training.engines.torch import TorchConfig
from fedray.training.torch_engine import TorchEngine, loss_scale


class StepLosses(TorchConfig):
    path: str
    """The file: a loss per line, of the final pass too."""

    def build(self, adapter: Any, train: Any, device: str, process_group: Any) -> Any:
        return _Recording(adapter, loss_scale(adapter.model), process_group, Path(self.path))


class _Recording(TorchEngine):
    def __init__(self, adapter: Any, scale: float, process_group: Any, path: Path) -> None:
        super().__init__(adapter, scale, process_group)
        self._path, self._loss = path, 0.0

    def backward(self, loss: Any, last: bool) -> None:
        self._loss += float(loss.detach())
        super().backward(loss, last)

    def step(self) -> None:
        super().step()
        with self._path.open("a") as file:
            file.write(f"{self._loss!r}\n")
        self._loss = 0.0
