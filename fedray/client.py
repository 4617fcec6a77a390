"""ClientActor: a worker as a Ray actor. It gets clients in chunks and streams their results back in blocks."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import ray
import torch

from fedray.config.clients import OffloadConfig
from fedray.methods.protocol import Initial
from fedray.training.deepspeed import compile_extensions
from fedray.training.metering import MemoryUse, cap_gpu_memory
from fedray.turns import Turn, serve, unpack
from fedray.worker import Job, Worker


@ray.remote(max_restarts=0)
class ClientActor:
    """One frozen base model and one adapter on a share of a node, serving any client.

    gpus: its share of a GPU; without one it does not see any, and of a part it never takes more memory than that.

    It keeps nothing of a client's between two: state and shard come as references, the next state goes back as one.
    """

    def __init__(self, gpus: float) -> None:
        if gpus == 0:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray hides no GPU from an actor that asked for none
        cap_gpu_memory(gpus)
        self.worker = Worker()
        self._shards: dict[Any, Any] = {}

    def ready(self) -> None:
        """Return once the actor has started."""

    def setup(self, job: Job) -> None:
        self.worker.setup(job)

    def initial(self) -> Initial:
        return self.worker.initial()

    def memory(self) -> MemoryUse:
        return self.worker.memory()

    def fuse_width(self, turns: Sequence[Turn]) -> int:
        """See `Worker.fuse_width`."""
        (given,) = unpack([turns], self._shards)
        return self.worker.fuse_width(*given)

    @ray.method(num_returns="streaming")
    def train(self, groups: Sequence[Sequence[Turn]]) -> Iterator[Any]:
        """See `serve`."""
        yield from serve(self.worker.train_many, groups, self._shards)


@ray.remote(num_cpus=0, max_calls=1, max_retries=0)  # DeepSpeed asks for the kind of device once per process
def build_extensions(offload: OffloadConfig, gpus: float) -> None:
    """Build DeepSpeed's extensions on the node where this runs; see `compile_extensions`. gpus: as of ClientActor."""
    if gpus == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    compile_extensions(offload, "cuda" if torch.cuda.is_available() else "cpu")
