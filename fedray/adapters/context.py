"""What the modules inside a model need to know of the forward pass they are part of.

A pre-hook on the whole model keeps the current batch's attention mask and labels in one small shared object, so that
hooks deep inside (interventions, mixers) know padding and prompts without any change to the model's code.
"""

import inspect
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fedray.adapters.client_batch import ClientBatch, Spread
from fedray.models.labels import current_labels
from fedray.types import IGNORED


class Batch:
    """The current forward pass.

    shape: (examples, tokens) of this pass; in a decoding step with a key-value cache tokens is usually 1.
    attention_mask: [examples, all tokens so far], 0 at padding; None: no padding.
    labels: [examples, tokens] of causal language modelling (-100 at the prompt), else None.
    decoding: whether a key-value cache already holds earlier tokens.
    real: boolean [examples], False at rows that only fill up a fused pass; None: there are none.
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
        self.selections: dict[Any, dict[str, Tensor]] = {}
        self.spreads: dict[Any, dict[str, Spread]] = {}

    @cached_property
    def valid(self) -> Tensor:
        """Boolean [examples, tokens]: True where a token is neither padding nor in a row that only fills up."""
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


class ForwardContext:
    """Shared by every adapter module of one model: the current batch, the dropout key, the mixers' statistics, and in
    fused passes whose rows these are.

    Args:
        model: the whole model; a forward pre-hook on it fills `batch`.
    """

    def __init__(self, model: nn.Module):
        self.batch: Batch | None = None
        self.dropout_key = 0
        self.client_batch: ClientBatch | None = None
        self._mixer: dict[int, tuple[Tensor, Tensor]] = {}
        self._signature = inspect.signature(model.forward)
        kinds = {parameter.kind: name for name, parameter in self._signature.parameters.items()}
        self._extra = kinds.get(inspect.Parameter.VAR_KEYWORD, "")
        model.register_forward_pre_hook(self._observe, with_kwargs=True)

    def _observe(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = self._signature.bind_partial(*args, **kwargs).arguments
        inputs |= inputs.pop(self._extra, {})
        tokens = inputs.get("input_ids")
        tokens = inputs.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            self.batch = None
            return
        shape = (int(tokens.shape[0]), int(tokens.shape[1]))
        mask, labels, cache = (inputs.get(name) for name in ("attention_mask", "labels", "past_key_values"))
        labels = current_labels() if labels is None else labels
        self.batch = Batch(
            shape,
            mask if isinstance(mask, Tensor) and mask.ndim == 2 else None,
            labels if isinstance(labels, Tensor) and tuple(labels.shape) == shape else None,
            decoding=cache is not None and cache.get_seq_length() > 0,
            device=tokens.device,
            real=None if self.client_batch is None else self.client_batch.real,
        )

    def record_mixer(self, own_weight: Tensor) -> None:
        """Add α_L, [examples, tokens], of one layer to the statistics; padding does not count."""
        valid = self.batch.valid if self.batch is not None and self.batch.shape == tuple(own_weight.shape) else None
        weights = own_weight.detach().double()
        slots = (0,) if self.client_batch is None else self.client_batch.slots
        counted = torch.ones_like(weights) if valid is None else valid.double()
        sums = (weights * counted).reshape(len(slots), -1).sum(1)
        counts = counted.reshape(len(slots), -1).sum(1)
        for slot, added, count in zip(slots, sums, counts, strict=True):
            before = self._mixer.get(slot)
            self._mixer[slot] = (added, count) if before is None else (before[0] + added, before[1] + count)

    def take_mixer_mean(self, slot: int = 0) -> float | None:
        """Return the mean α_L recorded since the last call, or None if there was none. slot: whose, in fused passes."""
        recorded = self._mixer.pop(slot, None)
        return float(recorded[0] / recorded[1]) if recorded is not None and recorded[1] > 0 else None
