"""`engine: torch`: plain torch, everything on the device."""

from typing import Any, ClassVar

from fedray.config import EngineConfig, EngineMemory, TrainConfig


class TorchConfig(EngineConfig):
    """Plain torch; see `fedray.training.torch_engine`."""

    name: ClassVar[str] = "torch"
    batches_clients: ClassVar[bool] = True
    holds_quantised: ClassVar[bool] = True
    groups_processes: ClassVar[bool] = True

    @property
    def steers(self) -> bool:
        return True

    def memory(self, adapter: Any, weights: int, train: TrainConfig) -> EngineMemory:
        from fedray.training.memory import optimizer_bytes, plain_memory

        return plain_memory(adapter, weights, optimizer_bytes(adapter.trainable_groups(), train))

    def build(self, adapter: Any, train: TrainConfig, device: str, process_group: Any) -> Any:
        from fedray.training.torch_engine import TorchEngine, loss_scale

        return TorchEngine(adapter, loss_scale(adapter.model), process_group)


ENTRY = TorchConfig
