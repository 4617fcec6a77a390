"""The local work of one client in one round as a plain function of the payload. Every contender that leaves local
training to its user calls it."""

from functools import cache
from json import loads
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parameters_to_vector
from workloads import Workload

Vector = npt.NDArray[np.float32]


class LocalWork:
    """Local work with its expensive parts (base model, mapped data), which exist once per process."""

    def __init__(self, workload: Workload):
        torch.set_num_threads(1)
        self.workload = workload
        if workload.kind == "null":
            return
        self.data = np.load(workload.data, mmap_mode="r")
        self.module = cnn() if workload.kind == "cnn" else lora(workload)
        self.parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def initial(self) -> Vector:
        """Return the first payload."""
        return np.zeros(self.workload.payload, np.float32) if self.workload.kind == "null" else self.read()

    def read(self) -> Vector:
        vector: Vector = parameters_to_vector(self.parameters).detach().numpy()
        return vector

    def load(self, vector: Vector) -> None:
        start = 0
        for parameter in self.parameters:
            values = np.array(vector[start : start + parameter.numel()])
            parameter.data.copy_(torch.from_numpy(values).view_as(parameter))
            start += parameter.numel()

    def train(self, client: int, server_round: int, vector: Vector) -> Vector:
        """Return the payload that the client sends back."""
        if self.workload.kind == "null":
            return vector + np.float32(1)
        self.load(vector)
        optimizer = self.make_optimizer(self.parameters)
        for batch in self.batches(client, server_round):
            self.loss(torch.from_numpy(batch)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return self.read()

    def batches(self, client: int, server_round: int) -> list[npt.NDArray[Any]]:
        """Return the batches of this client and round, in a new order."""
        workload = self.workload
        order = np.random.default_rng([client, server_round]).permutation(workload.examples)
        cuts = [order[start : start + workload.batch] for start in range(0, workload.examples, workload.batch)]
        return [self.data[client][cut] for cut in cuts[: workload.steps]]

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Return a new optimizer; every client task starts with one."""
        if self.workload.kind == "cnn":
            return torch.optim.SGD(parameters, lr=self.workload.lr, fused=True)
        return torch.optim.AdamW(parameters, lr=self.workload.lr, weight_decay=0.0, fused=True)

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        if self.workload.kind == "cnn":
            return cnn_loss(self.module, batch)
        mask = torch.ones_like(batch)
        loss: torch.Tensor = self.module(input_ids=batch, attention_mask=mask, labels=batch, use_cache=False).loss
        return loss


@cache
def local_work(workload: str) -> LocalWork:
    """Return the process's single instance for this workload.

    Args:
        workload: as JSON.
    """
    return LocalWork(Workload(**loads(workload)))


def cnn() -> nn.Module:
    """1,626,442 parameters, for images of 32 × 32 × 3 and 10 classes."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(64 * 14 * 14, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


def cnn_loss(module: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy, where an image's label is its first value modulo 10.

    Args:
        images: uint8 [batch, 3, 32, 32].
    """
    labels = images[:, 0, 0, 0].long() % 10
    return functional.cross_entropy(module(images.float() / 255), labels)


def lora(workload: Workload) -> nn.Module:
    """The base model with peft's LoRA on query and value."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(workload.base)
    section = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    return get_peft_model(base, section).train()
