"""What one actor of a tier holds while it trains with a method, before anything is built or loaded.

Weights, adapter, gradients and optimizer are counted exactly, tensor by tensor, as the engines allocate them.
Activations are traced through one training step and one evaluation batch on shapes (`fedray.training.tracing`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from fedray.adapters.adapter import Adapter, TrainableGroup
from fedray.config import Config, MethodConfig, TierConfig, TrainConfig
from fedray.errors import ConfigError
from fedray.federation.worker import as_held, held_architecture, resolve_device
from fedray.methods.registry import build_method
from fedray.models.backbone import meta_backbone
from fedray.training.deepspeed_config import engine_config, zero_stage
from fedray.training.tracing import Traced, trace_evaluation, trace_step

FLOAT32 = 4
"""Bytes of one number of what DeepSpeed trains."""
DEEPSPEED_MAX_LIVE = 10**9
"""DeepSpeed's default of stage3_max_live_parameters."""


@dataclass(frozen=True)
class Memory:
    """Bytes in one place. weights: the base model, its task head and buffers. adapter: what the method inserts.
    gradients: of what trains, with the engine's buffers for them. optimizer: its state, and float32 copies of what it
    moves. activations: what a step (or an evaluation batch) holds at its peak beyond all these."""

    weights: int = 0
    adapter: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0

    @property
    def resting(self) -> int:
        """All but the activations."""
        return self.weights + self.adapter + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        return self.resting + self.activations


@dataclass(frozen=True)
class Footprint:
    """One actor. On a GPU tier `device` is GPU memory; on a CPU tier everything is host memory.

    device: where steps are computed. offloaded: kept on the host by the engine. vectors: the common starting point,
    which every actor keeps on the host; what a client receives lies in Ray's object store, and what it sends is made
    when its activations are gone. shared: the part of device.weights that, on a CPU, stays mapped from the node's file,
    and so is held once per node.
    """

    device: Memory
    offloaded: Memory
    vectors: int
    shared: int

    def host(self, on_gpu: bool) -> int:
        """Bytes of the host that the actor holds beyond its bare process; on a CPU with the shared weights."""
        return self.offloaded.total + self.vectors + (0 if on_gpu else self.device.total)

    def private(self, on_gpu: bool) -> int:
        """The same without the shared weights."""
        return self.host(on_gpu) - (0 if on_gpu else self.shared)


@dataclass(frozen=True)
class Tokens:
    """Of the longest example in training and in evaluation."""

    training: int
    evaluation: int


def predict(
    config: Config, architecture: PretrainedConfig, entry: MethodConfig, tier: str, tokens: Tokens
) -> Footprint:
    """Return what an actor of the tier holds at its peak with the method.

    Raises:
        ConfigError: a step of this model cannot be traced without values.
    """
    held, train = config.clients.tier(tier), config.section_for(entry, tier).train
    backbone = meta_backbone(held_architecture(architecture, held), config.task)
    model = as_held(backbone, held, resolve_device(config, held))
    base = [*model.parameters(), *model.buffers()]
    weights = _bytes(base)
    adapter = build_method(config, entry, tier).attach(model)
    adapter.fit(held.capacity)
    vectors = FLOAT32 * sum(adapter.layout(name).size for name in adapter.names)
    frozen = _bytes([tensor for tensor in base if not tensor.requires_grad])
    stage = zero_stage(held.offload)
    device, offloaded = held_by_engine(adapter, weights, train, held)
    try:
        together = held.fuse_width
        step = trace_step(adapter.model, config.task, together * train.batch_size, tokens.training)
        examples = together * config.evaluation.batch_size
        evaluation = trace_evaluation(adapter.model, config.task, examples, tokens.evaluation)
    except Exception as error:  # models of the hub's and methods of the user's own may look at values
        raise ConfigError(
            f"method {entry.key!r} on tier {tier!r}: its memory cannot be predicted, since a step cannot be traced "
            f"without values: {type(error).__name__}: {error}"
        ) from error
    if (lanes := held.fuse_width) > 1:
        device = _for_lanes(device, adapter, train, lanes)
    activations = _activations(step, evaluation, device.gradients, stage)
    return Footprint(
        Memory(device.weights, device.adapter, device.gradients, device.optimizer, activations),
        offloaded,
        vectors,
        0 if stage == 3 else frozen,
    )


def held_by_engine(adapter: Adapter, weights: int, train: TrainConfig, tier: TierConfig) -> tuple[Memory, Memory]:
    """Return what lies on the device and what the engine offloads, without activations.

    Stage 3 brings weights to the device as they are used, and lets go of them when DeepSpeed's limit is reached: at
    most that many. `params: nvme` counts as `cpu`. The user's own `deepspeed` counts by its bucket sizes and limits.

    Args:
        weights: bytes of the model before the adapter was attached.
    """
    groups = adapter.trainable_groups()
    inserted = _bytes([*adapter.model.parameters(), *adapter.model.buffers()]) - weights
    trained = _bytes([parameter for group in groups for parameter in group.parameters])
    stage = zero_stage(tier.offload)
    if stage == 0:
        return Memory(weights, inserted, trained, _optimizer_state(groups, trained, train)), Memory()
    zero: Mapping[str, Any] = engine_config(train, tier.offload, tier.deepspeed).get("zero_optimization", {})
    bucket = FLOAT32 * int(zero.get("reduce_bucket_size", max(trained // FLOAT32, 16)))
    if stage == 2:
        flat = sum(_even(sum(p.numel() for p in group.parameters)) for group in groups) * FLOAT32
        largest = max(p.nbytes for group in groups for p in group.parameters)
        accumulated = trained if train.accumulation > 1 else 0
        return (
            Memory(weights, inserted + flat - trained, bucket + largest),
            Memory(gradients=flat + largest + accumulated, optimizer=4 * flat),  # masters, their copy, two moments
        )
    limit = int(zero.get("stage3_max_live_parameters", DEEPSPEED_MAX_LIVE))
    width = max(parameter.itemsize for parameter in adapter.model.parameters())
    return (
        Memory(weights=min(weights + inserted, limit * width), gradients=bucket),
        Memory(weights, inserted, gradients=2 * trained, optimizer=3 * trained),  # masters, two moments
    )


def _for_lanes(device: Memory, adapter: Adapter, train: TrainConfig, lanes: int) -> Memory:
    """Clients that are trained in one step: beside the adapter itself, a stack of all their values and, in training, a
    copy of it, and as many gradients and moments."""
    groups = adapter.trainable_groups()
    trained = _bytes([parameter for group in groups for parameter in group.parameters])
    stack = lanes * FLOAT32 * sum(adapter.layout(name).size for name in adapter.names)
    optimizer = _optimizer_state(groups, trained, train)
    return Memory(device.weights, device.adapter + 2 * stack, lanes * trained, lanes * optimizer)


def _activations(step: Traced, evaluation: Traced, gradients: int, stage: int) -> int:
    """In plain torch gradients come while activations go: what the peak of both has beyond all gradients. An
    evaluation has no gradients, so that their room is free. ZeRO moves gradients away as they come."""
    if stage > 0:
        return max(step.activations, evaluation.peak - gradients)
    return max(step.peak, evaluation.peak, gradients) - gradients


def _optimizer_state(groups: Sequence[TrainableGroup], trained: int, train: TrainConfig) -> int:
    if train.optimizer == "sgd":
        return trained if train.momentum else 0
    return 2 * trained + FLOAT32 * sum(len(group.parameters) for group in groups)  # two moments; a step per tensor


def _even(count: int) -> int:
    """DeepSpeed's flat buffers have even lengths."""
    return count + count % 2


def _bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Tied tensors are one."""
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())
