"""What one actor of a tier holds while it trains with a method, before anything is built or loaded.

Weights, adapter, gradients and optimizer are counted exactly, tensor by tensor, as the engines allocate them.
Activations are traced through the largest training steps, the largest batches of an evaluation and, where texts are
measured, one batch of them on shapes (`fedray.training.tracing`).
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass

from transformers import PretrainedConfig

from fedray.adapters.adapter import Adapter
from fedray.config import Config, Memory, MethodConfig, TrainConfig
from fedray.errors import ConfigError
from fedray.methods.registry import build_method
from fedray.models.backbone import meta_backbone
from fedray.training.base_model import as_held, held_architecture, held_once, resolve_device
from fedray.training.batch_shapes import LargestBatches
from fedray.training.memory import FLOAT32, frozen_bytes, optimizer_bytes, tensor_bytes, trained_bytes
from fedray.training.mixed_precision import mixed_precision
from fedray.training.tracing import Traced, trace_evaluation, trace_generation, trace_step

KEPT_PER_UNIT = 2 * (4 + 8 + 8)
"""Bytes of a unit's loss, prediction and label at the end of an evaluation, batch by batch and as a whole."""


@dataclass(frozen=True)
class Footprint:
    """One actor. On a GPU tier `device` is GPU memory; on a CPU tier everything is host memory.

    device: where steps are computed. offloaded: kept on the host by the engine. vectors: the common starting point,
    which every actor keeps on the host; what a client receives lies in Ray's object store, and what it sends is made
    when its activations are gone. shared: the part of device.weights that, on a CPU, stays mapped from the node's file,
    and so is held once per node. held_once: the part that actors on parts of one GPU hold once per GPU.
    """

    device: Memory
    offloaded: Memory
    vectors: int
    shared: int
    held_once: int = 0

    def host(self, on_gpu: bool) -> int:
        """Bytes of the host that the actor holds beyond its bare process; on a CPU with the shared weights."""
        return self.offloaded.total + self.vectors + (0 if on_gpu else self.device.total)

    def private(self, on_gpu: bool) -> int:
        """The same without the shared weights."""
        return self.host(on_gpu) - (0 if on_gpu else self.shared)


def predict(
    config: Config,
    architecture: PretrainedConfig,
    entry: MethodConfig,
    tier: str,
    largest: LargestBatches,
    asked: Set[str],
) -> Footprint:
    """Return what an actor of the tier holds at its peak with the method.

    Args:
        largest: batches of the tier's clients.
        asked: arguments of `Local.train` that the method uses (`Cost.asked`).

    Raises:
        ConfigError: a step of this model cannot be traced without values, or the engine does not say what it holds.
    """
    held, train = config.clients.tier(tier), config.section_for(entry, tier).train
    backbone = meta_backbone(held_architecture(architecture, held), config.task)
    model = as_held(backbone, held, resolve_device(config, held))
    base = [*model.parameters(), *model.buffers()]
    adapter = mixed_precision(build_method(config, entry, tier).attach(model))
    weights = tensor_bytes(base)
    adapter.fit(held.capacity)
    vectors = FLOAT32 * sum(adapter.layout(name).size for name in adapter.names)
    frozen = frozen_bytes(base)
    try:
        resting = held.engine.memory(adapter, weights, train)
    except ConfigError as error:
        raise ConfigError(f"method {entry.key!r} on tier {tier!r}: {error}") from error
    device = resting.device
    together = held.fuse_width
    try:
        step, evaluation = (
            _largest([trace(adapter.model, config.task, shape.times(together)) for shape in shapes])
            for trace, shapes in ((trace_step, largest.training), (trace_evaluation, largest.evaluation))
        )
        if largest.prompts is not None:
            options, new_tokens = config.evaluation.generation, config.evaluation.max_new_tokens
            generation = trace_generation(adapter.model, options, largest.prompts.times(together), new_tokens)
            evaluation = _largest([evaluation, generation])
        kept = together * KEPT_PER_UNIT * largest.scored
        evaluation = _largest([evaluation, Traced(kept, kept)])
    except Exception as error:  # models of the hub's and methods of the user's own may look at values
        raise ConfigError(
            f"method {entry.key!r} on tier {tier!r}: its memory cannot be predicted, since a step cannot be traced "
            f"without values: {type(error).__name__}: {error}"
        ) from error
    if together > 1:
        device = _of_client_batch(device, adapter, train, together)
    # A steering's vectors, or the sum of gradients, and in the step itself gradients, values and what is added as
    # matrices (`fedray.training.steering`).
    kept = len(asked & {"steering", "mean_gradient"}) * device.gradients
    passing = 3 * device.gradients if kept else 0
    activations = _activations(step, evaluation, device.gradients, resting.moves_gradients, passing)
    return Footprint(
        Memory(device.weights, device.adapter, device.gradients, device.optimizer + kept, activations),
        resting.host,
        vectors,
        0 if held.engine.weights_on_host else frozen,
        held_once(config, held, frozen, adapter),
    )


def _largest(traced: Sequence[Traced]) -> Traced:
    """Return what the largest of several takes; nothing if there is none."""
    return Traced(
        max((one.activations for one in traced), default=0),
        max((one.peak for one in traced), default=0),
    )


def _of_client_batch(device: Memory, adapter: Adapter, train: TrainConfig, clients: int) -> Memory:
    """Return what is held where clients are trained in one step: besides the adapter itself, a stack of all their
    values and, in training, a copy of it, and as many gradients and moments."""
    groups = adapter.trainable_groups()
    stack = clients * FLOAT32 * sum(adapter.layout(name).size for name in adapter.names)
    gradients, optimizer = clients * trained_bytes(groups), clients * optimizer_bytes(groups, train)
    return Memory(device.weights, device.adapter + 2 * stack, gradients, optimizer)


def _activations(step: Traced, evaluation: Traced, gradients: int, moves_gradients: bool, passing: int) -> int:
    """Return what a step or an evaluation holds at its peak beyond weights, adapter, gradients and optimizer.

    Gradients that stay arise while activations are released: the peak of both counts, less all gradients. An evaluation
    has no gradients, so that their room is free. An engine that moves gradients away holds all activations besides.

    Args:
        passing: what is held besides the gradients while they are changed, when there are no activations.
    """
    if moves_gradients:
        return max(step.activations, evaluation.peak - gradients)
    return max(step.peak, evaluation.peak, gradients + passing) - gradients
