"""ClientActor: a worker as a Ray actor. It receives task batches and streams back result batches."""

import os
from collections.abc import Iterator
from typing import Any

import ray
import torch

from fedray.config import EngineConfig
from fedray.federation.result_batches import ResultBatcher
from fedray.federation.tasks import WorkerSetup
from fedray.federation.worker import Worker
from fedray.methods.protocol import Initial
from fedray.runtime.messages import Message, TaskBatch, from_message, resolve_tasks, to_message
from fedray.training.metering import MemoryUse, cap_gpu_memory, gpu_memory
from fedray.training.process_memory import freeze_heap


@ray.remote(max_restarts=0)
class ClientActor:
    """One frozen base model and one adapter on a share of a node, serving any client.

    The actor keeps nothing of a client: shards arrive as references, and states are in the run's folder.

    Args:
        gpus: share of a GPU. With 0 the actor sees no GPU; with a fraction it never takes more than this fraction of
            the GPU's memory.
    """

    def __init__(self, gpus: float) -> None:
        if gpus == 0:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray hides no GPU from an actor that asked for none
        cap_gpu_memory(gpus)
        self.worker = Worker(gpus=gpus)
        self._shards: dict[Any, Any] = {}
        freeze_heap()

    def ready(self) -> None:
        """Return once the actor has started."""

    def setup(self, message: Message) -> str:
        """Get ready for a method; return this process's location.

        Args:
            message: contains the `WorkerSetup`.
        """
        setup: WorkerSetup = from_message(message)
        self._shards.clear()  # they may be those of another experiment, if trials share the actor
        self._batcher = ResultBatcher(setup, self.worker.train_together)
        self.worker.setup(setup)
        return location()

    def initial(self) -> Initial:
        """See `Worker.initial`."""
        return self.worker.initial()

    def memory(self) -> MemoryUse:
        """See `Worker.memory`."""
        return self.worker.memory()

    def gpu_memory(self) -> int | None:
        """See `metering.gpu_memory`."""
        return gpu_memory()

    def width_seconds(self, batch: TaskBatch) -> dict[int, float]:
        """See `Worker.width_seconds`."""
        (tasks,) = resolve_tasks(batch, self._shards)
        return self.worker.width_seconds(tasks)

    @ray.method(num_returns="streaming")
    def train(self, batch: TaskBatch) -> Iterator[Message]:
        """See `ResultBatcher.serve`; yields the batches of results."""
        for results in self._batcher.serve(resolve_tasks(batch, self._shards), batch.batch_seconds):
            yield to_message(results)


def location() -> str:
    """Return this process's node and number, as in `node-3 (10.0.0.7), process 4711`."""
    address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return f"{os.uname().nodename} ({address}), process {os.getpid()}"


@ray.remote(num_cpus=0, max_calls=1, max_retries=0)  # DeepSpeed asks for the kind of device once per process
def prepare_node(message: Message, gpus: float) -> None:
    """Prepare the node where this task runs for an engine (`EngineConfig.prepare_node`).

    Args:
        message: contains the engine's `EngineConfig`.
        gpus: as for `ClientActor`.
    """
    if gpus == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    engine: EngineConfig = from_message(message)
    engine.prepare_node("cuda" if torch.cuda.is_available() else "cpu")
