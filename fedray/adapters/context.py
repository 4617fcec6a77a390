"""What the modules inside a model need to know about the current forward pass.

A pre-hook on the whole model keeps the current batch's attention mask and labels in one small shared object, so that
hooks deep inside (interventions, mixers) know padding and prompts without any change to the model's code.
"""

import inspect
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fedray.adapters.client_batch import ClientBatch, Spread
from fedray.errors import ConfigError
from fedray.models.labels import current_labels
from fedray.models.observing import observed
from fedray.types import IGNORED

CACHES = ("past_key_values", "cache_params", "state")
"""What models call the argument with which generation passes on what they have read: attention, Mamba, RWKV."""


class Batch:
    """The current forward pass.

    Args:
        shape: (examples, tokens) of this pass; in a decoding step with a cache tokens is usually 1.
        attention_mask: [examples, all tokens so far], 0 at padding; None: no padding.
        labels: [examples, tokens] of causal language modelling (-100 at the prompt), else None.
        decoding: whether a cache already holds earlier tokens.
        device: where the tokens are.
        real: boolean [examples], False at padding rows of a client batch; None: there are none.

    Attributes:
        alpha: each example's weight of the second branch, [examples]; None: examples have none of their own
            (`fedray.adapters.similarity`).
    """

    def __init__(
        self,
        shape: tuple[int, int],
        attention_mask: Tensor | None,
        labels: Tensor | None,
        decoding: bool,
        device: Any,
        real: Tensor | None = None,
    ):
        self.shape, self.attention_mask, self.labels, self.decoding = shape, attention_mask, labels, decoding
        self.device, self.real = device, real
        self.alpha: Tensor | None = None
        self.selections: dict[Any, dict[str, Tensor]] = {}
        self.spreads: dict[Any, dict[str, Spread]] = {}

    @cached_property
    def valid(self) -> Tensor:
        """Boolean [examples, tokens]: True where a token is neither padding nor in a padding row."""
        if self.attention_mask is None:
            valid = torch.ones(self.shape, dtype=torch.bool, device=self.device)
        else:
            valid = self.attention_mask[:, -self.shape[1] :].bool()
        return valid if self.real is None else valid & self.real[:, None]

    @cached_property
    def prompt(self) -> Tensor:
        """Boolean [examples, tokens]: the prompt's tokens where labels tell them apart (all non-padding tokens of an
        example without prompt), else all non-padding tokens."""
        if self.labels is None:
            return self.valid
        prompt = self.valid & (self.labels == IGNORED)
        return torch.where(prompt.any(dim=1, keepdim=True), prompt, self.valid)

    @cached_property
    def last_of_prompt(self) -> Tensor:
        """[examples]: the place of the last token before the last answer; where labels tell of none, of the last token
        that is no padding."""
        places = torch.arange(self.shape[1], device=self.device)
        last = (places * self.valid).argmax(1)
        if self.labels is None:
            return last
        scored = self.labels != IGNORED
        before_answer = scored[:, 1:] & ~scored[:, :-1]
        return torch.where(before_answer.any(1), (places[:-1] * before_answer).argmax(1), last)


class ForwardContext:
    """Shared by every adapter module of one model: the current batch, the dropout key, what modules
    observe, and in client batches whose rows these are.

    Args:
        model: the whole model; a forward pre-hook on it fills `batch`.
    """

    def __init__(self, model: nn.Module):
        self.batch: Batch | None = None
        self.dropout_key = 0
        self.client_batch: ClientBatch | None = None
        self._observed: dict[int, dict[str, tuple[Tensor, Tensor]]] = {}
        self._signature = inspect.signature(model.forward)
        kinds = {parameter.kind: name for name, parameter in self._signature.parameters.items()}
        self._extra = kinds.get(inspect.Parameter.VAR_KEYWORD, "")
        model.register_forward_pre_hook(self.enter, with_kwargs=True)

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return what the model is called with, by the names of its arguments."""
        inputs: dict[str, Any] = self._signature.bind_partial(*args, **kwargs).arguments
        inputs |= inputs.pop(self._extra, {})
        return inputs

    def enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the batch of the pass that begins."""
        inputs = self.inputs(args, kwargs)
        tokens = inputs.get("input_ids")
        tokens = inputs.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            self.batch = None
            return
        shape = (int(tokens.shape[0]), int(tokens.shape[1]))
        mask, labels = inputs.get("attention_mask"), inputs.get("labels")
        labels = current_labels() if labels is None else labels
        self.batch = Batch(
            shape,
            mask if isinstance(mask, Tensor) and mask.ndim == 2 else None,
            labels if isinstance(labels, Tensor) and tuple(labels.shape) == shape else None,
            decoding=any(_holds_tokens(inputs.get(name)) for name in CACHES),
            device=tokens.device,
            real=None if self.client_batch is None else self.client_batch.real,
        )

    def alpha_for(self, x: Tensor) -> Tensor | None:
        """Return the examples' weights of the second branch in a shape that fits x [..., d]; None: they have none.

        Raises:
            ConfigError: x has not one row per example, or per example and token.
        """
        if self.batch is None or self.batch.alpha is None:
            return None
        alpha, (examples, tokens) = self.batch.alpha, self.batch.shape
        if x.ndim == 2 and len(x) == examples * tokens:
            return alpha.repeat_interleave(tokens)[:, None]
        if len(x) != examples:
            raise ConfigError(
                f"a layer of the model reads {tuple(x.shape)}, not one row per example; choose other lora.targets"
            )
        return alpha.reshape(-1, *(1 for _ in x.shape[1:]))

    def observe(self, name: str, values: Tensor) -> None:
        """Add values of one module to the mean that is recorded under a name; padding does not count, nor does what
        generation computes (`fedray.models.observing`).

        Call it in evaluation mode only: what is observed there becomes a column of the client's row.

        Args:
            name: the column; modules that use the same name share one mean.
            values: one number per token, [examples, tokens].
        """
        if not observed():
            return
        valid = self.batch.valid if self.batch is not None and self.batch.shape == tuple(values.shape) else None
        numbers = values.detach().double()
        slots = (0,) if self.client_batch is None else self.client_batch.slots
        counted = torch.ones_like(numbers) if valid is None else valid.double()
        sums = (numbers * counted).reshape(len(slots), -1).sum(1)
        counts = counted.reshape(len(slots), -1).sum(1)
        for slot, added, count in zip(slots, sums, counts, strict=True):
            of_slot = self._observed.setdefault(slot, {})
            before = of_slot.get(name)
            of_slot[name] = (added, count) if before is None else (before[0] + added, before[1] + count)

    def take_observed(self, slot: int = 0) -> dict[str, float]:
        """Return the means observed since the last call, by name.

        Args:
            slot: the member of a client batch whose means are meant.
        """
        found = self._observed.pop(slot, {})
        return {name: float(total / count) for name, (total, count) in found.items() if count > 0}


def _holds_tokens(cache: Any) -> bool:
    """Return whether a cache holds earlier tokens."""
    if cache is None:
        return False
    if not hasattr(cache, "get_seq_length"):
        return True  # RWKV's states, which exist only after a first pass
    try:
        return bool(cache.get_seq_length() > 0)
    except ValueError:  # layers of linear attention alone have states, and no length
        return bool(cache.has_previous_state())
