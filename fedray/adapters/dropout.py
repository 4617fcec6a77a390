"""Dropout whose mask is a pure function of a key: it depends on no global generator, and repeating a forward pass with
the same key (a second branch, recomputation under activation checkpointing) repeats the mask."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedray.adapters.client_batch import CannotBatch
from fedray.adapters.context import ForwardContext
from fedray.randomness import keyed_seed


def dropout_mask(key: int, name: str, shape: Sequence[int], p: float, device: torch.device) -> Tensor:
    """Return the boolean mask (True: kept, with probability 1 − p) of the layer `name` under `key`.

    Equal on every machine for one kind of device; cpu and cuda draw different streams.
    """
    generator = torch.Generator(device=device)
    generator.manual_seed(keyed_seed(key, "dropout", name))
    return torch.rand(tuple(shape), generator=generator, device=device) >= p


class KeyedDropout(nn.Module):
    """Inverted dropout keyed by the context's `dropout_key` and the layer's name; the identity when evaluating.

    Args:
        p: probability of dropping an element.
        name: name of the layer, unique within the model.
        context: holds the key, which is set anew for every micro-batch.
    """

    def __init__(self, p: float, name: str, context: ForwardContext):
        super().__init__()
        self.p, self.name, self.context = p, name, context

    def forward(self, x: Tensor, shapes: Sequence[Sequence[int]] | None = None) -> Tensor:
        """Drop elements of x.

        Args:
            x: [..., d].
            shapes: in a client batch, each member's own shape of x without d; default (examples, tokens).
        """
        if not self.training or self.p == 0:
            return x
        return x * self._mask(x, shapes) / (1 - self.p)

    def _mask(self, x: Tensor, shapes: Sequence[Sequence[int]] | None) -> Tensor:
        """Return the mask. In a client batch, every member's draw is as it would be alone: by its own key, in its own
        batch's shape.

        Raises:
            CannotBatch: x has another shape than the pass's tokens, so that a member's shape alone is not known.
        """
        members = self.context.client_batch
        if members is None:
            return dropout_mask(self.context.dropout_key, self.name, x.shape, self.p, x.device)

        def draw(key: int, shape: Sequence[int]) -> Tensor:
            return dropout_mask(key, self.name, shape, self.p, x.device)

        if shapes is not None:
            return members.mask(x, shapes, draw)
        rows = members.count * members.rows
        if x.shape[0] not in (rows, rows * members.tokens) or x.shape[:-1].numel() != rows * members.tokens:
            raise CannotBatch(f"{self.name} reads {tuple(x.shape)}, which is not one row per example and token")
        by_token = x.reshape(rows, members.tokens, x.shape[-1])
        return members.mask(by_token, members.shapes, draw).reshape(x.shape)

    def extra_repr(self) -> str:
        return f"p={self.p}"
