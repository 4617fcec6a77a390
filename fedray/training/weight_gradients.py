"""The gradient of the loss with respect to the frozen weights of a LoRA's target layers, as low-rank matrices.

With δ_t = ∂L/∂y_t at token t of a layer y = W x, the gradient is G = Σ_t δ_t x_tᵀ [d_out, d_in], L the mean loss of the
examples. G is never formed: subspace iteration (Halko et al., arXiv 0909.4061) needs only G Ω and Qᵀ G, two sums over
the tokens, and takes a backward pass over the examples for each of them.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from fedray.adapters.adapter import Adapter
from fedray.aggregation.low_rank import LowRank, truncate
from fedray.data.batches import batches
from fedray.evaluation.losses import num_units, score
from fedray.randomness import keyed_rng
from fedray.training.torch_engine import loss_scale
from fedray.training.training_context import TrainingContext

OVERSAMPLED = 8
"""Further columns of the subspace, which make its first ones accurate."""
ITERATIONS = 2
"""Subspace iterations; each takes two more passes over the examples."""

Product = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Given x [tokens, d_in], δ [tokens, d_out] and a basis, returns what is summed over the tokens."""


def weight_gradients(
    adapter: Adapter, table: pa.Table, rank: int, training_context: TrainingContext
) -> dict[str, LowRank]:
    """Return the best approximation of rank `rank` that subspace iteration finds of each target's gradient, by module
    path: exact for the rank of the gradient or more. Adapter dropout is off; no parameter's gradient is touched."""
    right: dict[str, Tensor] = {}
    for path, layer in adapter.targets.items():
        size = min(rank + OVERSAMPLED, layer.d_out, layer.d_in)
        gaussian = keyed_rng(training_context.seed, "weight_gradients", path).normal(size=(layer.d_in, size))
        right[path] = torch.from_numpy(gaussian.astype(np.float32)).to(training_context.device)
    for _ in range(1 + ITERATIONS):
        columns = _summed(adapter, table, training_context, lambda x, delta, basis: delta.T @ (x @ basis), right)
        left = {path: torch.linalg.qr(found).Q for path, found in columns.items()}
        rows = _summed(adapter, table, training_context, lambda x, delta, basis: (delta @ basis).T @ x, left)
        right = {path: torch.linalg.qr(found.T).Q for path, found in rows.items()}
    return {path: truncate(LowRank(left[path].cpu().numpy(), row.cpu().numpy()), rank) for path, row in rows.items()}


def _summed(
    adapter: Adapter,
    table: pa.Table,
    training_context: TrainingContext,
    product: Product,
    bases: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Return the sums over all tokens of all examples, by path."""
    totals: dict[str, Tensor] = {}
    scale = loss_scale(adapter.model)

    def add(path: str, x: Tensor, delta: Tensor) -> None:
        x, delta = (tokens.detach().float().reshape(-1, tokens.shape[-1]) for tokens in (x, delta))
        found = product(x, delta / scale, bases[path])
        totals[path] = totals[path] + found if path in totals else found

    units = int(num_units(table, training_context.task).sum())
    train, device = training_context.train, training_context.device
    adapter.model.eval()
    for batch in batches(table, train.batch_size, training_context.pad_token_id, None, device):
        with _shifted(adapter.targets, add) as shifts:
            loss = score(adapter.model, batch, training_context.task).losses.sum() / units
            torch.autograd.grad(loss * scale, shifts)
    return totals


@contextmanager
def _shifted(targets: Mapping[str, nn.Module], add: Callable[[str, Tensor, Tensor], None]) -> Iterator[list[Tensor]]:
    """Within, a zero shift is added to each target's output, and the backward pass calls `add` with path, x and δ."""
    shifts: list[Tensor] = []

    def watch(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not torch.is_grad_enabled():  # a pass of the adapter's own (`fedray.adapters.similarity`)
                return output
            shifts.append(output.new_zeros(output.shape[-1], requires_grad=True))
            shifted = output + shifts[-1]
            shifted.register_hook(lambda delta: add(path, args[0], delta))  # type: ignore[no-untyped-call]
            return shifted

        return hook

    handles = [module.register_forward_hook(watch(path)) for path, module in targets.items()]
    try:
        yield shifts
    finally:
        for handle in handles:
            handle.remove()
