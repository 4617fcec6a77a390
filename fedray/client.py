"""ClientActor: a worker as a Ray actor."""

import os
from typing import Any

import ray
import torch

from fedray.config.clients import OffloadConfig
from fedray.data.shards import Shard
from fedray.methods.protocol import Initial
from fedray.training.deepspeed import compile_extensions
from fedray.worker import Assignment, Job, Outcome, Worker


@ray.remote(max_restarts=0)
class ClientActor:
    """One frozen base model and one adapter on a share of a node, serving any client.

    gpus: its share of a GPU; without one it does not see any.

    It keeps nothing between two clients: state and shard come as references and the next state goes back as one.
    """

    def __init__(self, gpus: float) -> None:
        if gpus == 0:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray hides no GPU from an actor that asked for none
        self.worker = Worker()

    def ready(self) -> None:
        """Return once the actor has started."""

    def setup(self, job: Job) -> None:
        self.worker.setup(job)

    def initial(self) -> Initial:
        return self.worker.initial()

    @ray.method(num_returns=2)
    def train(self, assignment: Assignment, downlink: Any, state: Any, shard: Shard) -> tuple[Outcome, Any]:
        return self.worker.train(assignment, downlink, state, shard)

    def close(self) -> None:
        """Nothing that outlives the process."""


@ray.remote(num_cpus=0, max_calls=1, max_retries=0)  # DeepSpeed asks for the kind of device once per process
def build_extensions(offload: OffloadConfig, gpus: float) -> None:
    """Build DeepSpeed's extensions on the node where this runs; see `compile_extensions`. gpus: as of ClientActor."""
    if gpus == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    compile_extensions(offload, "cuda" if torch.cuda.is_available() else "cpu")
