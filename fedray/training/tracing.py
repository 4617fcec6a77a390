"""How much memory a step takes beyond the model itself, from shapes alone: no weights are read, nothing is allocated.

The model is run on torch's fake tensors, which have shapes, types and storages of a size, and no memory behind them.
Every storage that an operation allocates is followed until it is freed; storages that exist at the same time are added
up. Sizes depend on which tokens have a loss and which are edited, so values that follow from the batch's integers are
really computed.
"""

import inspect
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import masking_utils

from fedray.adapters.context import CACHES
from fedray.config import GenerationSection
from fedray.evaluation.evaluate import score_units
from fedray.evaluation.generation import processors
from fedray.evaluation.losses import score
from fedray.models.observing import unobserved
from fedray.training.batch_shapes import BatchShape
from fedray.types import IGNORED, Task

aten = torch.ops.aten

VALUES = "fedray_values"
"""Attribute of a fake tensor of whole numbers: its values."""
LARGEST_COMPUTED = 1_000_000
"""Numbers; masks of attention, [tokens, tokens] per example, may have more and select nothing."""


@dataclass(frozen=True)
class Traced:
    """Bytes beyond parameters and buffers.

    Attributes:
        activations: the peak of everything but the parameters' gradients.
        peak: the peak with gradients, which is less than the sum: gradients arise while activations are released.
    """

    activations: int
    peak: int


def trace_step(model: nn.Module, task: Task, shape: BatchShape) -> Traced:
    """Return what a training step on one micro-batch takes, forward and backward.

    Operations are a CPU's, attention included; what they use inside, and what the allocator rounds up, is not seen.
    For causal_lm, the last tokens of every example have a loss, as many of one as of another.

    Args:
        model: on the meta device, with the adapter and with what trains chosen; it cannot be used afterwards, except
            for another trace.
        task: decides the loss.
        shape: of the micro-batch.
    """
    return _trace(model, task, shape, training=True)


def trace_evaluation(model: nn.Module, task: Task, shape: BatchShape) -> Traced:
    """Return what the losses and predictions of one batch take, without gradients; otherwise as `trace_step`."""
    return _trace(model, task, shape, training=False)


def trace_generation(model: nn.Module, options: GenerationSection, shape: BatchShape, new_tokens: int) -> Traced:
    """Return what generating texts takes: reading the prompts, or the last token's step, for which the cache holds all
    tokens before it; otherwise as `trace_step`.

    Args:
        options: how; every beam has a cache of its own.
        shape: of the prompts that are read together.
        new_tokens: generated for each.
    """
    rows, tokens = shape.examples * options.num_beams, shape.tokens
    keeps = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with FakeTensorMode(), _masks_by_value(), unobserved(), torch.no_grad():
        _materialise(model)
        model.eval()
        with _LiveStorages() as live:

            def read(number: int, held: int = 0, **cache: Any) -> Any:
                ids = torch.ones(rows, number, dtype=torch.long)
                mask = (torch.arange(held + number) >= shape.padded).long().repeat(rows, 1)
                return model(input_ids=ids, attention_mask=mask, use_cache=True, **keeps, **cache)

            def choose(logits: Tensor, written: int) -> None:
                scores = logits[:, -1].to(copy=True, dtype=torch.float32)
                if options.num_beams > 1:
                    scores = torch.log_softmax(scores, -1)
                ids, starts = torch.ones(rows, tokens + written, dtype=torch.long), torch.zeros(rows, dtype=torch.long)
                draws = torch.zeros(rows, new_tokens, dtype=torch.float64) if options.do_sample else None
                scores = processors(options, starts, tokens, draws)(ids, scores)
                if options.num_beams > 1:
                    scores + torch.zeros(rows, 1)

            choose(read(tokens).logits, 0)
            if (before := new_tokens - 1) > 0:
                held = tokens + before - 1
                with live.uncounted():
                    read_before = read(held)
                    cache = {name: value for name in CACHES if (value := getattr(read_before, name, None)) is not None}
                    del read_before
                choose((read(1, held, **cache) if cache else read(held + 1)).logits, before)
    return Traced(live.largest, live.largest)


def _trace(model: nn.Module, task: Task, shape: BatchShape, training: bool) -> Traced:
    with FakeTensorMode(), _masks_by_value(), unobserved(), nullcontext() if training else torch.no_grad():
        parameters = _materialise(model)
        model.train(training)
        with _LiveStorages() as live:
            batch = _batch(task, shape)
            for parameter in parameters:
                if training and parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(live.gradient)  # type: ignore[no-untyped-call]
            if training:
                score(model, batch, task).losses.sum().backward()  # type: ignore[no-untyped-call]
            else:
                score_units(model, batch, task)
    return Traced(live.largest_activations, live.largest)


def _batch(task: Task, shape: BatchShape) -> dict[str, Tensor]:
    ids = torch.ones(shape.examples, shape.tokens, dtype=torch.long)
    mask = (torch.arange(shape.tokens) < shape.tokens - shape.padded).long().repeat(shape.examples, 1)
    number = torch.long if task == "classification" else torch.float32
    labels = _labels(shape) if task == "causal_lm" else torch.ones(shape.examples, dtype=number)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _labels(shape: BatchShape) -> Tensor:
    """Return labels of the last tokens: ⌊(units + e) / examples⌋ of example e, which add up to all units."""
    answers = (shape.units + torch.arange(shape.examples)).div(shape.examples, rounding_mode="floor")
    answered = torch.arange(shape.tokens) >= shape.tokens - answers[:, None]
    return torch.where(answered, 1, IGNORED)


@contextmanager
def _masks_by_value() -> Iterator[None]:
    """Let transformers leave out the masks of attention that a batch without padding does not need. It makes all of
    them for fake tensors, since it takes their values to be unknown."""
    fake = masking_utils.is_tracing

    def unknown(tensor: Any = None) -> bool:
        return not hasattr(tensor, VALUES) and bool(fake(tensor))

    masking_utils.is_tracing = unknown
    try:
        yield
    finally:
        masking_utils.is_tracing = fake


def _materialise(model: nn.Module) -> Sequence[nn.Parameter]:
    """Replace tensors on the meta device by fake tensors of a CPU, in place; tied parameters stay tied."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    value = torch.empty(parameter.shape, dtype=parameter.dtype)
                    made[id(parameter)] = nn.Parameter(value, parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return list(made.values())


class _LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that were made since it was entered and are still alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = self.largest_activations = 0
        self._now = self._gradients = 0
        self._known: dict[int, int] = {}
        """Bytes of each living storage by its identity."""
        self._of_gradients: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        before = {id(tensor.untyped_storage()) for tensor in _tensors((args, kwargs))}
        if function is aten.nonzero.default:
            made = _where(args[0])
        elif function in (aten.item.default, aten._local_scalar_dense.default) and hasattr(args[0], VALUES):
            with unset_fake_temporarily():
                return getattr(args[0], VALUES).item()
        elif function is aten.index.Tensor:
            indices = [
                part
                for index in args[1]
                for part in (_where(index).unbind(1) if index is not None and index.dtype == torch.bool else [index])
            ]
            made = function(args[0], indices)
        else:
            made = function(*args, **kwargs)
            _compute(function, args, kwargs, made)
        for tensor in _tensors(made):
            if id(tensor.untyped_storage()) not in before:
                self._follow(tensor.untyped_storage())
        return made

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Let the peaks within not count; what is alive afterwards counts again."""
        largest = self.largest, self.largest_activations
        yield
        self.largest, self.largest_activations = largest

    def gradient(self, parameter: Tensor) -> None:
        """Count a parameter's gradient as such from now on."""
        assert parameter.grad is not None
        key = id(parameter.grad.untyped_storage())
        if key in self._known and key not in self._of_gradients:
            self._of_gradients.add(key)
            self._gradients += self._known[key]

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._known:
            return
        self._known[key] = storage.nbytes()
        self._now += storage.nbytes()
        self.largest = max(self.largest, self._now)
        self.largest_activations = max(self.largest_activations, self._now - self._gradients)
        weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        size = self._known.pop(key)
        self._now -= size
        if key in self._of_gradients:
            self._of_gradients.remove(key)
            self._gradients -= size


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _compute(function: Any, args: Any, kwargs: Any, made: Any) -> None:
    """Give a fake tensor of whole numbers its values, where those of all that it is made from are known."""
    known = all(hasattr(tensor, VALUES) for tensor in _tensors((args, kwargs)))
    wanted = isinstance(made, Tensor) and not made.is_floating_point() and made.numel() <= LARGEST_COMPUTED
    if known and wanted:
        real_args, real_kwargs = tree_map_only(Tensor, lambda tensor: getattr(tensor, VALUES), (args, kwargs))
        with unset_fake_temporarily():
            setattr(made, VALUES, function(*real_args, **real_kwargs))
    elif isinstance(made, Tensor) and hasattr(made, VALUES):  # changed in place by what is not known
        delattr(made, VALUES)


def _where(mask: Tensor) -> Tensor:
    """Return a mask's indices, [elements that are true, dimensions]; all of them where its values are not known."""
    count = mask.numel()
    if hasattr(mask, VALUES):
        with unset_fake_temporarily():
            count = int(torch.count_nonzero(getattr(mask, VALUES)))
    return torch.empty(count, mask.ndim, dtype=torch.long)
