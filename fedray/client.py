"""ClientActor: a worker as a Ray actor."""

import os
from typing import Any

import ray

from fedray.data.shards import Shard
from fedray.methods.protocol import Initial
from fedray.training.metering import MemoryUse, cap_gpu_memory
from fedray.worker import Assignment, Job, Outcome, Worker


@ray.remote(max_restarts=0)
class ClientActor:
    """One frozen base model and one adapter on a share of a node, serving any client.

    gpus: its share of a GPU; without one it does not see any, and of a part it never takes more memory than that.

    It keeps nothing between two clients: state and shard come as references and the next state goes back as one.
    """

    def __init__(self, gpus: float) -> None:
        if gpus == 0:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray hides no GPU from an actor that asked for none
        cap_gpu_memory(gpus)
        self.worker = Worker()

    def setup(self, job: Job) -> None:
        self.worker.setup(job)

    def initial(self) -> Initial:
        return self.worker.initial()

    def memory(self) -> MemoryUse:
        return self.worker.memory()

    @ray.method(num_returns=2)
    def train(self, assignment: Assignment, downlink: Any, state: Any, shard: Shard) -> tuple[Outcome, Any]:
        return self.worker.train(assignment, downlink, state, shard)
