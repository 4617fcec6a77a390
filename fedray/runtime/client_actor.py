"""ClientActor: a worker as a Ray actor. It gets clients in chunks and streams their results back in blocks."""

import os
from collections.abc import Iterator
from typing import Any

import ray
import torch

from fedray.config.clients import OffloadConfig
from fedray.federation.result_batches import ResultBatcher
from fedray.federation.worker import Worker, WorkerSetup
from fedray.methods.protocol import Initial
from fedray.runtime.messages import Message, TaskBatch, to_message, unpack
from fedray.training.deepspeed import compile_extensions
from fedray.training.metering import MemoryUse, cap_gpu_memory
from fedray.training.process_memory import freeze_heap


@ray.remote(max_restarts=0)
class ClientActor:
    """One frozen base model and one adapter on a share of a node, serving any client.

    gpus: its share of a GPU; without one it does not see any, and of a part it never takes more memory than that.

    It keeps nothing of a client's between two: shards come as references, states are in the run's folder.
    """

    def __init__(self, gpus: float) -> None:
        if gpus == 0:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray hides no GPU from an actor that asked for none
        cap_gpu_memory(gpus)
        self.worker = Worker()
        self._shards: dict[Any, Any] = {}

    def ready(self) -> None:
        """Return once the actor has started."""

    def setup(self, job: WorkerSetup) -> str:
        """Get ready for a method; return where this is."""
        self._shards.clear()  # of another experiment's, where actors are lent
        self.blocks = ResultBatcher(job, self.worker.train_many)
        self.worker.setup(job)
        freeze_heap()
        return location()

    def initial(self) -> Initial:
        return self.worker.initial()

    def memory(self) -> MemoryUse:
        return self.worker.memory()

    def width_seconds(self, chunk: TaskBatch) -> dict[int, float]:
        """See `Worker.width_seconds`."""
        ((assignments, downlinks, states, shards),) = unpack(chunk, self._shards)
        return self.worker.width_seconds(assignments, downlinks, [None] * len(states), shards)

    @ray.method(num_returns="streaming")
    def train(self, chunk: TaskBatch) -> Iterator[Message]:
        """See `ResultBatcher.serve`; yields the blocks."""
        for block in self.blocks.serve(unpack(chunk, self._shards), chunk.block_seconds):
            yield to_message(block)


def location() -> str:
    """Return this process's node and number, as in `node-3 (10.0.0.7), process 4711`."""
    address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return f"{os.uname().nodename} ({address}), process {os.getpid()}"


@ray.remote(num_cpus=0, max_calls=1, max_retries=0)  # DeepSpeed asks for the kind of device once per process
def build_extensions(offload: OffloadConfig, gpus: float) -> None:
    """Build DeepSpeed's extensions on the node where this runs; see `compile_extensions`. gpus: as of ClientActor."""
    if gpus == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    compile_extensions(offload, "cuda" if torch.cuda.is_available() else "cpu")
