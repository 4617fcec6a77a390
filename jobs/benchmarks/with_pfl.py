"""A row on pfl: FederatedAveraging on a PyTorchModel, with users created when they are drawn.

    [torchrun --nproc-per-node 2] with_pfl.py WORKLOAD WORKERS RESULT

Module, loss, optimizer and batches come from the common LocalWork; the training loop is pfl's own.
"""

import os
import sys
from json import loads
from typing import Any

import numpy as np
import torch
from local_work import LocalWork
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import get_user_sampler
from pfl.data.user_state import InMemoryUserStateStorage
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import nn
from workloads import Timeline, Workload


class Module(nn.Module):
    """A row's module with the two functions that pfl requires; the first round's metrics cost nothing."""

    def __init__(self, work: LocalWork):
        super().__init__()
        null = work.workload.kind == "null"
        self.inner = nn.ParameterList([torch.zeros(work.workload.payload)]) if null else work.module
        self.loss = work.loss

    def metrics(self, *_: Any, **__: Any) -> dict[str, Weighted]:
        return {"none": Weighted(0, 1)}


class CommonWork(FederatedAveraging):
    """pfl's FedAvg, with the row's null step and private state around it."""

    def __init__(self, workload: Workload):
        super().__init__()
        self.workload, self.states, self.seen = workload, InMemoryUserStateStorage(), set[str]()

    def train_one_user(self, initial: Any, model: Any, user: Any, context: Any) -> Any:
        if self.workload.state:
            known, zeros = user.user_id in self.seen, np.zeros(self.workload.state, np.float32)
            state = self.states.load_state(user.user_id)["values"] if known else zeros
            self.states.save_state({"values": state + np.float32(1)}, user.user_id)
            self.seen.add(user.user_id)
        if self.workload.kind != "null":
            return super().train_one_user(initial, model, user, context)
        model.variable_map["inner.0"].data += 1
        return model.get_model_difference(initial), Metrics()


class Ends(TrainingProcessCallback):
    def __init__(self, timeline: Timeline):
        self.timeline = timeline

    def on_train_begin(self, *, model: Any) -> Metrics:
        self.timeline.begin()
        return Metrics()

    def after_central_iteration(self, *_: Any, **__: Any) -> tuple[bool, Metrics]:
        self.timeline.end_round()
        return False, Metrics()


def main(text: str, workers: str, result: str) -> None:
    workload, timeline = Workload(**loads(text)), Timeline(result)
    work = LocalWork(workload)

    def user(id: str) -> PyTorchTensorDataset:
        order = np.random.permutation(workload.examples)[: workload.batch * workload.steps]
        data = np.zeros((1, 1), np.float32) if workload.kind == "null" else work.data[int(id)][order]
        return PyTorchTensorDataset((torch.from_numpy(data),), user_id=id)

    def optimizer(parameters: Any, lr: float) -> torch.optim.Optimizer:
        return work.make_optimizer([parameter for parameter in parameters if parameter.requires_grad])

    module = Module(work)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    model = PyTorchModel(module, optimizer, torch.optim.SGD(trained, lr=1.0))
    users = FederatedDataset(user, get_user_sampler("minimize_reuse", [str(k) for k in range(workload.clients)]))
    CommonWork(workload).run(
        NNAlgorithmParams(workload.rounds, 10**6, workload.per_round, None),
        SimulatedBackend(training_data=users, val_data=users),
        model,
        NNTrainHyperParams(workload.batch, 1, workload.lr),
        callbacks=[Ends(timeline)],
    )
    if os.environ.get("RANK", "0") == "0":
        timeline.write(value=trained[0].detach().flatten()[0].item(), numbers=sum(p.numel() for p in trained))


if __name__ == "__main__":
    main(*sys.argv[1:])
